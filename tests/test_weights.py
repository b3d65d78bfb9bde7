"""The shipped weights: what they draw is what was asked, by judges that this project does not ship."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch.utils.flop_counter import FlopCounterMode

from app.settings import Settings
from ddpm_core import data
from ddpm_core.checkpoint import load_model
from ddpm_core.network import OnnxNetwork
from tests.mnist import mnist_root
from tests.service.conftest import Service, pixels

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "weights" / "mnist"
STUDENT = ROOT / "weights" / "mnist-2"
of_each = pytest.mark.parametrize("directory", [WEIGHTS, STUDENT], ids=lambda path: path.name)


@pytest.fixture(scope="module", params=[WEIGHTS, STUDENT], ids=lambda path: path.name)
def shipped(request: pytest.FixtureRequest) -> Iterator[Service]:
    """The app on shipped weights."""
    running = Service(Settings(model=str(request.param), device="cpu"))
    running.start()
    yield running
    running.stop()


def as_8x8(digit: np.ndarray) -> np.ndarray:
    """A 28x28 digit as scikit-learn's bundled set has them: cut to its box, 8 high, about 6 wide, 0 .. 16."""
    rows, columns = (np.flatnonzero((digit > 100).any(axis)) for axis in (1, 0))
    box = digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    width = min(8, max(1, round(6 * box.shape[1] / box.shape[0])))
    small = Image.fromarray(box).resize((width, 8), Image.Resampling.BOX)
    out = np.zeros((8, 8))
    left = (8 - width) // 2
    out[:, left : left + width] = np.asarray(small, float) * 1.3 / 16
    return out.clip(max=16).ravel()


def mnist_judge(root: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A support vector machine on MNIST's test images, which neither the model nor our classifier has seen."""
    images = data.load("mnist", root, train=False)
    x = images.images[:6000].flatten(1).numpy() / 255
    judge = SVC(C=10, gamma="scale").fit(x, images.labels[:6000].numpy())
    return lambda digits: judge.predict(digits.reshape(len(digits), -1) / 255)


def digits_judge() -> Callable[[np.ndarray], np.ndarray]:
    """The same on scikit-learn's bundled digits: other writers, another scanner."""
    bundled = load_digits()
    judge = SVC(C=10, gamma=0.0005).fit(bundled.data, bundled.target)
    return lambda digits: judge.predict(np.array([as_8x8(digit) for digit in digits]))


def test_a_foreign_classifier_reads_the_asked_label(shipped: Service) -> None:
    """Of 200 digits at least nine in ten, where MNIST is at hand: the judge itself reads 95 in 100 real ones.

    Elsewhere the judge of the bundled 8x8 digits, which reads 65 in 100 of MNIST's; chance is 10.
    """
    asked = np.arange(200) % 10
    drawn = []
    for first in range(0, 200, 50):
        body = {"n": 50, "label": asked[:50].tolist(), "seed": 1000 + first}
        answer = shipped.generate(body, accept="application/json").json()
        drawn += [pixels(base64.b64decode(image["b64_json"])) for image in answer["images"]]
    root = mnist_root()
    judge, bound = (mnist_judge(root), 0.9) if root else (digits_judge(), 0.5)
    assert (judge(np.array(drawn)) == asked).mean() >= bound


@of_each
def test_diffusers_loads_the_shipped_directory_and_agrees(directory: Path) -> None:
    from diffusers import DDPMScheduler, UNet2DModel

    theirs = UNet2DModel.from_pretrained(directory / "unet").double().eval()
    ours = load_model(directory)
    x = torch.randn(3, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, label = torch.tensor([0, 400, 999]), torch.tensor([0, 7, 10])
    with torch.inference_mode():
        difference = (theirs(x, t, class_labels=label).sample - ours.net.double()(x, t, label)).abs().max()
    assert difference <= 1e-9
    scheduler = DDPMScheduler.from_pretrained(directory / "scheduler")
    assert np.allclose(scheduler.alphas_cumprod, ours.schedule.alphas_cumprod, atol=1e-6)


def test_one_call_of_the_shipped_network_stays_under_600_mflop() -> None:
    model = load_model(WEIGHTS)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.net(torch.zeros(1, *model.config.image_shape), torch.tensor([5]), torch.tensor([3]))
    assert 0.1e9 < counter.get_total_flops() <= 0.6e9


@of_each
def test_the_shipped_graph_is_of_the_shipped_weights(directory: Path) -> None:
    """No start of the service has to make it, also where it could not keep it."""
    assert isinstance(load_model(directory).network(torch.device("cpu")), OnnxNetwork)
