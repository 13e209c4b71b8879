"""Golden loss curves, which detect any change of the objective, the data order or the draws.

After an intended change, write the file again and give the reason in the commit:

    python -m tests.train.test_train_golden
"""

import json
import tempfile
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from latent_t2i.model.diffusion import ObjectiveConfig
from latent_t2i.model.ema import EMAConfig
from latent_t2i.train.config import OptimConfig, TrainConfig
from latent_t2i.train.loop import train
from tests import tiny
from tests.train.conftest import MODEL, metrics

GOLDEN = Path(__file__).with_name("golden_loss.json")
RELATIVE = 1e-4
"""Other builds of torch sum in another order."""
VARIANTS = {
    "epsilon": ObjectiveConfig(),
    "v, weighted": ObjectiveConfig(prediction="v", snr_gamma=5.0, caption_dropout=0.3),
}


def make_curve(folder: Path, variant: str) -> list[dict[str, float]]:
    """Loss and gradient norm of twenty steps on shards of noise."""
    config = TrainConfig(
        name="golden",
        shards=(str(tiny.make_shards(folder / "shards")),),
        out=str(folder / "run"),
        batch_size=4,
        num_steps=20,
        mixed_precision="no",
        log_every_steps=1,
        model=MODEL,
        objective=VARIANTS[variant],
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=3, schedule="cosine"),
        ema=EMAConfig(decay=0.9),
    )
    AcceleratorState._reset_state(True)
    train(config)
    return [{key: line[key] for key in ("loss", "grad_norm")} for line in metrics(folder / "run")]


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_match_the_golden_curve(tmp_path: Path, variant: str) -> None:
    curve = json.loads(GOLDEN.read_text())[variant]
    found = make_curve(tmp_path, variant)
    assert len(found) == len(curve) == 20
    for step, (line, golden) in enumerate(zip(found, curve, strict=True)):
        assert line == pytest.approx(golden, rel=RELATIVE), (
            f"step {step}: see this file's docstring"
        )


def write_golden() -> None:
    """Writes the file."""
    curves = {}
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            curves[variant] = make_curve(Path(folder), variant)
    GOLDEN.write_text(json.dumps(curves, indent=1) + "\n")


if __name__ == "__main__":
    write_golden()
