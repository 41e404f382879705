"""Two processes learn what one learns from the joined batch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from matfound.structures.atomic_data import collate

sys.path.insert(0, str(Path(__file__).parent))  # as for the script itself
import two_ranks

sys.path.pop(0)


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """What two processes have left in a folder."""
    folder = tmp_path_factory.mktemp("ranks")
    script = str(Path(two_ranks.__file__))
    processes = [subprocess.Popen([sys.executable, script, str(rank), str(folder)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    for process in processes:
        _, error = process.communicate(timeout=100)  # nobody waits for somebody who does not come
        assert process.returncode == 0, error
    return folder


def alone(*, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5)) -> dict[str, np.ndarray]:
    data = two_ranks.samples()
    return two_ranks.step(two_ranks.prepared(), collate([data[i] for i in order]), 1)


@pytest.mark.parametrize("how", ["joined", "empty"])
@pytest.mark.parametrize("rank", [0, 1])
def test_gradients_are_those_of_the_joined_batch(how, rank, together):
    found, expected = np.load(together / f"{how}-{rank}.npz"), alone()
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-13, err_msg=name)
    assert found["logged"] > 0


def test_what_has_no_label_gets_zeros_and_what_has_no_target_nothing(together):
    found = np.load(together / "joined-0.npz")
    assert not np.any(found["potential.heads.nodes.readout.last"])
    assert np.any(found["potential.heads.gap.readout.last"])
    assert not [name for name in found if "heads.idle" in name]


@pytest.mark.parametrize("what", ["validation", "validation of one"])
def test_validation_is_that_of_one_process(what, together):
    results = [json.loads((together / f"results-{rank}.json").read_text())[what] for rank in range(2)]
    assert results[0] == results[1]
    expected = two_ranks.validation(two_ranks.prepared(), [collate(two_ranks.samples())])
    assert list(results[0]) == list(expected)
    assert results[0] == pytest.approx(expected, rel=1e-10)
    assert {"val/loss", "val/ranks_assays_auroc", "val/ranks_numbers_mae_over_spread", "val/ranks_kinds_accuracy"} <= expected.keys()
    assert "val/ranks_nodes_mae" not in expected


@pytest.mark.parametrize("stage", ["training", "validation"])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("infinite", r"loss became inf at step 0 on the frames frame-4, frame-5 \(lower"),
        ("class", "target 'ranks_kinds': the label 7 is outside the classes 0 to 2 of its head"),
    ],
)
def test_an_error_of_one_is_an_error_of_both(how, message, stage, together):
    errors = [json.loads((together / f"results-{rank}.json").read_text())[f"{how} {stage}"] for rank in range(2)]
    assert errors[0] == errors[1]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(errors[0])
