"""What a resumed run remembers beside its weights: the best score, and where the learning rate shall end."""

from __future__ import annotations

import errno
import operator
from types import SimpleNamespace

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Engine, Events, State
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR, PolynomialLR
from torch.utils.data import DataLoader

from medseg3d.training import BestWeights, ResumeFromLast


class Training:
    """A trainer whose validation gives the scores that it is told, one an epoch."""

    def __init__(self, folder, scores, epochs):
        self.network = nn.Linear(2, 1)
        nn.init.constant_(self.network.bias, len(scores))
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1.0)
        self.schedule = PolynomialLR(self.optimizer, total_iters=epochs)
        self.validator = Engine(lambda engine, batch: None)
        self.validator.state_dict_user_keys.append("key_metric_name")
        self.validator.state.key_metric_name = "dice"
        self.validator.metric_cmp_fn = operator.gt
        best = BestWeights(folder / "best.pt", self.network)
        best.attach(self.validator)
        self.rates = []
        self.trainer = Engine(lambda engine, batch: self.rates.append(self.optimizer.param_groups[0]["lr"]))
        saved = {"model": self.network, "optimizer": self.optimizer, "schedule": self.schedule, "best": best}
        ResumeFromLast(folder / "last.pt", saved).attach(self.trainer)
        scores = iter(scores)

        @self.trainer.on(Events.EPOCH_COMPLETED)
        def validate():
            self.schedule.step()
            self.network.bias.data += 0.125
            self.validator.state.metrics = {"dice": next(scores)}
            self.validator.fire_event(Events.COMPLETED)

    def run(self, epochs):
        self.trainer.run([0], max_epochs=epochs)
        return self


def best_weight(folder):
    return torch.load(folder / "best.pt", weights_only=True)["bias"].item()


def test_a_worse_network_of_a_resumed_run_does_not_replace_the_best(tmp_path):
    Training(tmp_path, [0.5, 0.8], epochs=9).run(2)
    best = best_weight(tmp_path)
    Training(tmp_path, [0.7, 0.6], epochs=9).run(4)
    assert best_weight(tmp_path) == best
    Training(tmp_path, [0.9], epochs=9).run(5)
    assert best_weight(tmp_path) == best + 3 * 0.125


def test_a_stopped_run_may_go_on_to_more_epochs(tmp_path):
    Training(tmp_path, [0, 0], epochs=4).run(2)
    rates = Training(tmp_path, [0] * 6, epochs=8).run(8).rates
    assert rates == pytest.approx([0.5 * left / 6 for left in (6, 5, 4, 3, 2, 1)])


def test_a_run_that_has_ended_cannot_go_on(tmp_path):
    Training(tmp_path, [0, 0], epochs=2).run(2)
    Training(tmp_path, [], epochs=2).run(2)  # nothing is left to do, which is no error
    with pytest.raises(ValueError, match=r"ended at epoch 2.*start a new run from its weights"):
        Training(tmp_path, [0], epochs=3).run(3)


def test_a_run_of_another_config_is_told_so(tmp_path):
    Training(tmp_path, [0, 0], epochs=4).run(2)
    resume = ResumeFromLast(tmp_path / "last.pt", {"model": nn.Linear(2, 1), "ema": nn.Linear(2, 1)})
    with pytest.raises(ValueError, match=r"last.pt has no ema: another train.json wrote it"):
        resume.load(Engine(lambda engine, batch: None))


def test_weights_of_another_network_are_told(tmp_path):
    Training(tmp_path, [0, 0], epochs=4).run(2)
    resume, engine = (
        ResumeFromLast(tmp_path / "last.pt", {"model": nn.Linear(3, 1)}),
        Engine(lambda engine, batch: None),
    )
    engine.state.epoch_length = 1
    with pytest.raises(ValueError, match=r"model in .*last.pt does not fit: another train.json.*size mismatch"):
        resume.load(engine)


def test_one_cycle_may_be_prolonged(tmp_path):
    """From the rate that a run of that length has at this step."""

    def schedule(steps, taken):
        made = OneCycleLR(torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=1.0), 0.1, total_steps=steps)
        made.optimizer.step()
        for _ in range(taken):
            made.step()
        return made

    engine = Engine(lambda engine, batch: None)
    ResumeFromLast(tmp_path / "last.pt", {"schedule": schedule(10, taken=4)}).save(engine)
    resumed, expected = schedule(15, taken=0), schedule(15, taken=4)
    ResumeFromLast(tmp_path / "last.pt", {"schedule": resumed}).load(engine)
    for _ in range(10):
        resumed.step()
        expected.step()
        assert resumed.get_last_lr() == pytest.approx(expected.get_last_lr())


def test_another_learning_rate_is_told_to_be_without_effect(tmp_path, caplog):
    Training(tmp_path, [0, 0], epochs=9).run(2)
    same, other = Training(tmp_path, [0], epochs=9), Training(tmp_path, [0], epochs=9)
    for group in other.optimizer.param_groups:
        group["initial_lr"] = 0.25
    for training, told in ((same, 0), (other, 1)):
        with caplog.at_level("WARNING", "medseg3d.training.checkpoint"):
            training.run(3)
        assert sum("with its own learning rate, [1.0], not with [0.25]" in one for one in caplog.messages) == told


def test_another_number_of_iterations_is_told(tmp_path):
    Training(tmp_path, [0, 0], epochs=9).run(2)
    longer = Training(tmp_path, [0, 0], epochs=9)
    with pytest.raises(ValueError, match=r"had 1 iterations an epoch, so it cannot go on with 3: give the number"):
        longer.trainer.run([0, 0, 0], max_epochs=9)


def test_a_run_without_a_batch_is_refused(tmp_path):
    """As of one case with drop_last and a batch size of two: its epochs would pass without a step."""
    training = Training(tmp_path, [0], epochs=2)
    loader = DataLoader([0], batch_size=2, drop_last=True)
    with pytest.raises(
        ValueError, match="no batch to train on: batch_size is larger than the number of training cases"
    ):
        training.trainer.run(loader, max_epochs=2, epoch_length=1)
    assert not (tmp_path / "last.pt").exists()


def test_names_have_no_prefix_of_the_parallel_wrapper(tmp_path):
    idist.initialize("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        network = nn.Linear(2, 1)
        wrapped = DistributedDataParallel(network)
        resume = ResumeFromLast(tmp_path / "last.pt", {"model": wrapped})
        resume.save(Engine(lambda engine, batch: None))
        state = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
        assert state.keys() == {"weight", "bias"}
        network.weight.data.zero_()
        resume.load(Engine(lambda engine, batch: None))
        assert torch.equal(network.weight, state["weight"]) and state["weight"].abs().sum() > 0
    finally:
        idist.finalize()


def test_a_full_disk_leaves_the_earlier_files(tmp_path, monkeypatch):
    Training(tmp_path, [0.5], epochs=4).run(1)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fails(content, file):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match=r"cannot write .*best\.pt"):
        Training(tmp_path, [0.7], epochs=4).run(2)
    with pytest.raises(OSError, match=r"cannot write .*last\.pt"):
        Training(tmp_path, [0.3], epochs=4).run(2)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_score_that_is_not_a_number_is_not_the_best(tmp_path):
    Training(tmp_path, [float("nan"), 0.5, float("nan")], epochs=9).run(3)
    assert best_weight(tmp_path) == 3 + 2 * 0.125
    with pytest.raises(ValueError, match="needs a key metric"):
        BestWeights(tmp_path / "best.pt", nn.Linear(2, 1))._look(
            SimpleNamespace(state=State(key_metric_name=None, metrics={}))
        )


def test_a_damaged_file_is_told(tmp_path):
    Training(tmp_path, [0.5], epochs=4).run(1)
    last = tmp_path / "last.pt"
    for content in (b"", last.read_bytes()[:200]):
        last.write_bytes(content)
        with pytest.raises(ValueError, match=r"last\.pt is damaged, so its run cannot go on: delete it"):
            Training(tmp_path, [0.5], epochs=4).run(2)
