"""What a user sees of a run that is stopped."""

from __future__ import annotations

import pytest
import torch
from monai.engines import SupervisedTrainer
from monai.handlers import StatsHandler
from torch import nn

from medseg3d.training.run import leave_errors_to_the_caller


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
