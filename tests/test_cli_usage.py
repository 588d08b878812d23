"""What the command line takes: its verbs, their options, and what it says where they are wrong."""

from __future__ import annotations

import pytest

from medseg3d import __version__, cli, outputs, recipe
from medseg3d.inference import precision
from medseg3d.inference.uncertainty import KINDS

EVERY_VERB = {"-h --help", "-q --quiet", "-v --verbose"}
FLAGS = {
    "predict": {
        "-i --input",
        "--series",
        "-o --output",
        "-m --model",
        "--unite",
        "--weights",
        "-d --device",
        "-s --statistics",
        "-p --preview",
        "--masks",
        "--uncertainty",
        "-rp --report",
        "-ot --output-type",
        "--resume",
        "--compile",
        "--precision",
        "--strategy",
        "--overlap",
        "--mirror",
        "--plan",
        "--max-ram",
        "--max-vram",
        "--crop-body",
        "--allow-non-hu",
        "--trust",
    },
    "evaluate": {
        "-p --predictions",
        "-r --references",
        "-o --output",
        "--labels",
        "-m --model",
        "--manifest",
        "--nsd-tolerance",
    },
    "compare": {
        "-m --model",
        "--strategy",
        "--data",
        "--dataset-dir",
        "--split",
        "--fold",
        "--limit",
        "--labels",
        "-o --output",
        "--precision",
        "--nsd-tolerance",
        "-d --device",
        "--trust",
    },
    "adapt": {"data", "-o --output", "-m --model", "--dataset-dir", "--spacing"},
    "train": {
        *(
            "-m --model",
            "--data",
            "--dataset-dir",
            "--fold",
            "-o --output",
            "--epochs",
            "--patience",
            "--max-hours",
            "--tensorboard",
        ),
        *("--mlflow", "--set", "-d --device", "--trust"),
    },
    "models": {"action", "name", "--json"},
    "check": {
        "data",
        "-o --output",
        "--make-folds",
        "--seed",
        "--manifest",
        "--dataset-dir",
        "--patients",
        "--labels",
        "--objects",
        "--quick",
        "--strict",
        "--json",
    },
    "flops": {
        "what",
        "--size",
        "--json",
        "--csv",
        "--set",
        "--depth",
        "-m --model",
        "--spacing",
        "--trust",
        "--in",
        "--out",
        "--kernel",
        "--stride",
        "--padding",
        "--dilation",
        "--groups",
        "--transposed",
        "--dim",
        "--tokens",
        "--window",
        "--patch",
    },
    "doctor": {"--json"},
}


def verbs():
    (action,) = cli._parser()._subparsers._group_actions
    return action.choices


@pytest.mark.parametrize("verb", ["predict", "compare"])
def test_choices_are_those_of_what_runs(verb):
    """The tables stand in both, since a command that only shows its help does not import PyTorch."""
    choices = {action.dest: action.choices for action in verbs()[verb]._actions if action.choices}
    assert tuple(choices["strategy"]) == tuple(recipe.STRATEGIES)
    assert choices["precision"] == precision.PRECISIONS
    assert tuple(choices.get("uncertainty", KINDS)) == outputs.UNCERTAINTIES == tuple(KINDS)


def test_verbs_and_flags_are_frozen():
    """A flag that goes or changes its name breaks somebody's script: change this table only on purpose."""
    found = {
        name: {" ".join(action.option_strings) or action.dest for action in verb._actions}
        for name, verb in verbs().items()
    }
    assert found == {name: flags | EVERY_VERB for name, flags in FLAGS.items()}


@pytest.mark.parametrize("verb", FLAGS)
def test_help(verb, run):
    code, out, err = run(verb, "--help")
    assert (code, err) == (0, [])
    text = "\n".join(out)
    flags = {part for flag in FLAGS[verb] | EVERY_VERB for part in flag.split() if part.startswith("-")}
    assert all(flag in text for flag in flags)
    assert all(action.help for action in verbs()[verb]._actions), "everything says what it does"


def test_help_of_all(run):
    code, out, _ = run("--help")
    assert code == 0 and all(any(line.strip().startswith(verb) for line in out) for verb in FLAGS)
    assert "not for clinical decisions" in " ".join(out)
    assert run("--version") == (0, [f"medseg3d {__version__}"], [])


def test_defaults(monkeypatch):
    monkeypatch.delenv("MEDSEG3D_DEVICE", raising=False)
    args = cli._parser().parse_args(["predict", "-i", "a", "-o", "b"])
    assert (args.model, args.device, args.output_type, args.report) == (["headneck_ct_unet"], "auto", "nifti", None)
    assert (args.precision, args.strategy, args.overlap) == ("auto", None, None)
    assert (args.mirror, args.plan, args.max_ram, args.max_vram) == (False, False, None, None)
    assert (args.weights, args.uncertainty, args.crop_body) == (None, None, False)
    monkeypatch.setenv("MEDSEG3D_DEVICE", "cpu")
    assert cli._parser().parse_args(["predict", "-i", "a", "-o", "b"]).device == "cpu"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--allow_non_hu"], ["--allow-non-hu"]),
        (["--output_type=mha"], ["--output-type=mha"]),
        (["--dataset_dir", "my_data"], ["--dataset-dir", "my_data"]),
        (["--labels=my_labels.json"], ["--labels=my_labels.json"]),
        (["-i", "a_b.nii.gz", "-"], ["-i", "a_b.nii.gz", "-"]),
        (["--max_ram", "6G"], ["--max-ram", "6G"]),
    ],
)
def test_underscores_are_dashes(given, meant):
    assert cli._with_dashes(given) == meant


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["segment"],
        ["predict"],
        ["predict", "-i", "ct.nii.gz"],
        ["predict", "-i", "ct.nii.gz", "-o", "out", "--fast"],
        ["predict", "-i", "ct.nii.gz", "-o", "out", "-ot", "png"],
        ["predict", "-i", "ct.nii.gz", "-o", "out", "--precision", "int8"],
        ["predict", "-i", "ct.nii.gz", "-o", "out", "--strategy", "windows"],
        ["predict", "-i", "ct.nii.gz", "-o", "out", "--overlap", "half"],
        ["models", "info"],
        ["models", "list", "headneck_ct_unet"],
        ["models", "delete", "headneck_ct_unet"],
        ["evaluate", "-p", "a"],
        ["evaluate", "-p", "a", "-r", "b", "--nsd-tolerance", "two"],
        ["evaluate", "-p", "a", "-r", "b", "--nsd-tolerance", "nan"],
        ["compare", "--data", "openkbp_headneck", "-o", "out", "--nsd-tolerance", "-1"],
        ["compare", "--data", "openkbp_headneck", "-o", "out", "--fold", "1"],
        ["train"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, run):
    code, out, err = run(*arguments)
    assert (code, out) == (2, []) and "error: " in err[-1]


@pytest.mark.parametrize("verb", ["predict", "doctor"])
def test_an_unknown_option_shows_the_usage_of_its_verb(verb, run):
    needed = ("-i", "ct.nii.gz", "-o", "out") if verb == "predict" else ()
    code, out, err = run(verb, *needed, "--fast", "now")
    assert (code, out) == (2, []) and err[0].startswith(f"usage: medseg3d {verb} [-h]")
    assert err[-1].endswith(f"error: unrecognized arguments: --fast now; see medseg3d {verb} --help")
