"""Fidelity on real weights: SmolLM2 as a Mixtral of 8 experts, on held-out docstrings. Minutes long."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import fidelity
import make_model

pytestmark = pytest.mark.slow
# Change of the mean negative log-likelihood in nats a token: what a sound packing stays within. Such bounds
# tell gross faults only; the sharp check is against bitsandbytes' own round trip.
BOUNDS = {
    "INT8": 0.02,
    "NF4": 0.25,
    "NF4, double-quantized": 0.25,
    "FP4": 0.35,
    "NF4, attention as well": 0.4,
}
WEIGHT_ERRORS = {"INT8": 0.0085, "NF4": 0.0933, "NF4, double-quantized": 0.0934, "FP4": 0.125}


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_fidelity(tmp_path: Path, noise: float) -> None:
    folder = tmp_path / "model"
    assert make_model.main(["--out", str(folder), "--experts", "8", "--noise", str(noise)]) == 0
    rows = fidelity.measure(folder, fidelity.held_out_ids(folder, limit=1024))["rows"]
    for name, bound in BOUNDS.items():
        assert abs(rows[name]["change"]) < bound + 3 * rows[name]["standard_error"], name
    for name, error in WEIGHT_ERRORS.items():
        assert rows[name]["weight_error"] == pytest.approx(error, rel=0.03), name
        assert rows[name]["largest_logit_difference"] < 1e-4, name
    for name in fidelity.DAMAGES:
        assert rows[name]["change"] > 2, name
