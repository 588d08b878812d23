"""What a user sees of a run that is stopped."""

from __future__ import annotations

import pytest
import torch
from monai.bundle import ConfigParser
from monai.engines import SupervisedTrainer
from monai.handlers import StatsHandler
from torch import nn

from medseg3d.training.run import _require_same_data, leave_errors_to_the_caller


@pytest.mark.parametrize("error", [ValueError("the scan is damaged"), KeyboardInterrupt()])
def test_what_stops_a_run_is_raised_and_not_logged_besides(error, capfd, caplog):
    def stop(*given):
        raise error

    network = nn.Linear(2, 2)
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=[{"image": torch.zeros(1, 2), "label": torch.zeros(1, 2)}],
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        loss_function=stop,
        train_handlers=[StatsHandler(iteration_log=False)],
    )
    leave_errors_to_the_caller()
    with caplog.at_level("INFO"), pytest.raises(type(error)):
        trainer.run()
    told = caplog.text + "".join(capfd.readouterr())
    assert "Engine run" in told and "Traceback" not in told and "terminating due to exception" not in told


def test_a_run_is_not_resumed_on_other_cases(tmp_path):
    def parser(**settings):
        return ConfigParser(
            {"manifest": "m", "fold": None, "cases": None, "resume_path": str(tmp_path / "last.pt")} | settings
        )

    _require_same_data(tmp_path, parser(fold=0))
    _require_same_data(tmp_path, parser(fold=1))  # nothing had been trained
    (tmp_path / "last.pt").touch()
    _require_same_data(tmp_path, parser(fold=1))
    with pytest.raises(ValueError, match=r"had fold 1, so it cannot go on with fold 0.*choose another output folder"):
        _require_same_data(tmp_path, parser(fold=0))
    with pytest.raises(ValueError, match="had manifest m and fold 1, so it cannot go on with manifest n and fold None"):
        _require_same_data(tmp_path, parser(manifest="n"))
