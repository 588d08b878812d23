"""What a user sees of a run that is stopped."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from monai.bundle import ConfigParser
from monai.engines import SupervisedTrainer
from monai.handlers import StatsHandler
from torch import nn

from medseg3d.catalogue import find_bundle
from medseg3d.errors import in_words
from medseg3d.training import run
from medseg3d.training.run import _require_same_data, errors_left_to_the_caller, train_bundle


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
    with caplog.at_level("INFO"), pytest.raises(type(error)), errors_left_to_the_caller():
        trainer.run()
    told = caplog.text + "".join(capfd.readouterr())
    assert "Engine run" in told and "Traceback" not in told and "terminating due to exception" not in told


def test_training_leaves_the_loggers_of_the_process_as_they_were(tmp_path, monkeypatch):
    class Stopped:
        def __init__(self, **options):
            self.parser = ConfigParser({"resume_path": "", "manifest": "m"})

        def initialize(self):
            pass

        def run(self):
            seen.extend(filtered())
            raise KeyboardInterrupt

    def filtered():
        return [name for name in run._LOGGERS if run._is_no_error in logging.getLogger(name).filters]

    seen = []
    monkeypatch.setattr(run, "ConfigWorkflow", Stopped)
    monkeypatch.setattr(run, "_require_labels", lambda *given: None)
    with pytest.raises(KeyboardInterrupt):
        train_bundle(find_bundle("headneck_ct_unet").path, tmp_path, tmp_path / "run", "cpu", {}, progress=False)
    assert seen == list(run._LOGGERS) and filtered() == []


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


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({1: "mandible", 7: "brainstem"}, "label 1 is mandible in boxes and brainstem in headneck_ct_unet"),
        ({7: None}, "label 7 is missing in boxes and mandible in headneck_ct_unet.*medseg3d adapt .*boxes.json"),
        ({8: "liver"}, "label 8 is liver in boxes and missing in headneck_ct_unet"),
    ],
)
def test_labels_of_other_organs_are_refused_before_anything_is_read(labels, words, tmp_path):
    bundle = find_bundle("headneck_ct_unet")
    named = {0: "background"} | bundle.labels | labels
    cases = {"name": "boxes", "training": [{"image": "a.nii", "label": "b.nii"}]}
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(cases | {"labels": {str(n): name for n, name in named.items() if name}}))
    with pytest.raises(ValueError, match=words):
        train_bundle(bundle.path, None, tmp_path / "run", "cpu", {"manifest": str(path)}, progress=False)
    assert not (tmp_path / "run").exists()


def test_names_that_are_spelled_otherwise_are_the_same_organs(tmp_path):
    bundle = find_bundle("headneck_ct_unet")
    labels = {"0": "Background"} | {str(n): name.replace("_", "-").title() for n, name in bundle.labels.items()}
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"labels": labels, "training": [{"image": "a.nii", "label": "b.nii"}]}))
    with pytest.raises(RuntimeError) as error:
        train_bundle(bundle.path, None, tmp_path / "run", "cpu", {"manifest": str(path)}, progress=False)
    assert "a.nii is not in the dataset folder" in in_words(error.value)


def test_without_a_folder_or_a_list_it_says_how_to_name_them(tmp_path):
    bundle = find_bundle("headneck_ct_unet").path
    with pytest.raises(FileNotFoundError, match=r"data does not exist: --dataset-dir .* say --data with a datalist"):
        train_bundle(bundle, None, tmp_path / "run", "cpu", {}, progress=False)
    with pytest.raises(RuntimeError) as error:
        train_bundle(bundle, tmp_path, tmp_path / "run", "cpu", {}, progress=False)
    assert "for data of your own say --data with their list" in in_words(error.value)
