"""Each example runs by the command that examples/README.md has for it, and it trains."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integrations

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.name for path in ROOT.glob("examples/*.py"))
COMMANDS = dict(
    re.findall(
        r"^\| \[([\w.]+)\].* \| `([^`]+)` \|$",
        (ROOT / "examples" / "README.md").read_text(),
        re.MULTILINE,
    )
)
# What each prints beside losses and betas.
PRINTED = {
    "accelerate_loop.py": [r"^epoch 3:"],
    "deepspeed_zero.py": [r"^step 40  loss"],
    "hf_trainer.py": [r"'grad_norm': '[\d.]+'", r"'at_cap': '[\d.]+'"],
    "lightning_module.py": [r"^Automatic, epoch 3:", r"^Manual, epoch 3:"],
    "lora.py": [r"^trainable params: 17,408 ", r"'beta_mean': '[\d.]+'"],
    "plain_loop.py": [r"^going on from \d+ parameters", r"^step 99: "],
    "timm_training.py": [r"^epoch 5:"],
}

# Of betas, where it is not the default.
CAPS = {"deepspeed_zero.py": 0.95}

# In test_ranks.py.
WITH_TESTS_OF_THEIR_OWN = ["compiled.py", "cpu_offload.py", "fsdp2.py", "gradient_release.py"]


def test_each_example_is_in_the_readme_and_here():
    assert EXAMPLES
    assert sorted(COMMANDS) == EXAMPLES
    assert sorted([*PRINTED, *WITH_TESTS_OF_THEIR_OWN]) == EXAMPLES


@pytest.mark.parametrize("example", PRINTED)
def test_example(example):
    # python, and what else a command may be of, are those of the environment that runs the tests.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = subprocess.run(
        shlex.split(COMMANDS[example]),
        cwd=ROOT,
        env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    losses = [float(x) for x in re.findall(r"\bloss'?:?\s+'?([\d.]+)", result.stdout)]
    betas = [float(x) for x in re.findall(r"\bbeta(?:_mean':)?\s+'?([\d.]+)", result.stdout)]
    assert losses[-1] < 0.9 * losses[0], result.stdout
    assert 0 < min(betas) <= max(betas) <= CAPS.get(example, 0.89), result.stdout
    for pattern in PRINTED[example]:
        assert re.search(pattern, result.stdout, re.MULTILINE), result.stdout
