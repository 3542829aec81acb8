"""Add a network, a head and a data source by the steps of the README.

Each test applies the steps to a copy of the project and trains the result.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

PROJECT = Path(__file__).resolve().parents[1]


class Copy:
    """A copy of the project to extend."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("captcha_exp", "conf"):
            shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))

    def insert(self, file: str, before: str, text: str) -> None:
        """Insert text before the last occurrence of `before`."""
        path = self.folder / file
        head, found, tail = path.read_text().rpartition(before)
        assert found, f"{file}: {before!r} not found"
        path.write_text(head + text + found + tail)

    def replace(self, file: str, old: str, new: str) -> None:
        path = self.folder / file
        assert path.read_text().count(old) == 1, f"{file}: {old!r} must occur exactly once"
        path.write_text(path.read_text().replace(old, new))

    def train(self, *overrides: str) -> str:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "captcha_exp",
                "train",
                *TINY,
                "train.epochs=1",
                "tracking=none",
                *overrides,
            ],
            cwd=self.folder,
            env=os.environ | {"CAPTCHA_EXP_ROOT": str(self.folder / "root"), "PYTHONPATH": str(self.folder)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        (saved,) = (self.folder / "root").glob("outputs/*/*/config.yaml")
        return saved.read_text()


@pytest.fixture
def project(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def test_add_a_network(project: Copy) -> None:
    project.insert(
        "captcha_exp/model/networks.py",
        "class Recognizer(",
        "class PooledColumns(nn.Module):\n"
        "    def __init__(self, rows: int) -> None:\n"
        "        super().__init__()\n"
        "        self.pool = nn.AdaptiveAvgPool2d((rows, None))\n\n"
        "    def forward(self, images: Tensor) -> Tensor:\n"
        "        return self.pool(images.movedim(-1, 1).float() / 255).flatten(1, 2)\n\n\n",
    )
    project.insert(
        "captcha_exp/model/networks.py",
        "        case _:\n            assert_never(model)",
        "        case ColumnsConfig():\n            network = PooledColumns(model.rows)\n",
    )
    project.replace(
        "captcha_exp/model/networks.py",
        "from captcha_exp.config import ",
        "from captcha_exp.config.schema import ColumnsConfig\nfrom captcha_exp.config import ",
    )
    project.insert(
        "captcha_exp/config/schema.py",
        "ModelConfig: TypeAlias",
        "@dataclass(config=STRICT, frozen=True, kw_only=True)\n"
        "class ColumnsConfig(BaseModelConfig):\n"
        '    name: Literal["columns"]\n'
        "    rows: Annotated[int, Field(ge=1)]\n\n\n",
    )
    project.replace(
        "captcha_exp/config/schema.py",
        "[CompactConfig | ResNet18Config,",
        "[CompactConfig | ResNet18Config | ColumnsConfig,",
    )
    (project.folder / "conf/model/columns.yaml").write_text("name: columns\nrows: 4\nhead: position\n")

    overrides = [text for text in TINY if not text.startswith("model.")]
    assert len(overrides) == len(TINY) - 1
    assert "name: columns" in project.train("model=columns", "~model.channels", "model.rows=5")


def test_add_a_head(project: Copy) -> None:
    project.insert(
        "captcha_exp/model/networks.py",
        "def conv_bn(",
        "class HalvedHead(PositionHead):\n"
        "    def loss(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:\n"
        "        return super().loss(logits / 2, targets, smoothing)\n\n\n",
    )
    project.insert(
        "captcha_exp/model/networks.py",
        "        case _:\n            assert_never(model.head)",
        '        case "halved":\n'
        "            head = HalvedHead(*network(blank).shape[1:], captcha.length, len(captcha.alphabet))\n",
    )
    project.replace("captcha_exp/config/schema.py", '"grouped_softmax"]', '"grouped_softmax", "halved"]')

    assert "head: halved" in project.train("model.head=halved")


def test_add_a_data_source(project: Copy) -> None:
    project.insert(
        "captcha_exp/data/sources/generators.py",
        "def _make_captcha_renderer(",
        "def _make_plain_renderer(data: PlainConfig) -> RenderFn:\n"
        "    def render(text: str, rng: random.Random) -> Image.Image:\n"
        "        image = Image.new('L', (data.width, data.height), 255)\n"
        "        ImageDraw.Draw(image).text((rng.randrange(9), 20), text, fill=0, font_size=28)\n"
        "        return image\n\n"
        "    return render\n\n\n",
    )
    project.insert(
        "captcha_exp/data/sources/generators.py",
        "        case _:\n            assert_never(data)",
        "        case PlainConfig():\n"
        "            return RendererSpec(\n"
        '                "pillow", [], lambda: _make_plain_renderer(data), _sample_uniform_label\n'
        "            )\n",
    )
    project.replace(
        "captcha_exp/data/sources/generators.py",
        "import Image, ImageFont, features",
        "import Image, ImageDraw, ImageFont, features",
    )
    project.replace(
        "captcha_exp/data/sources/generators.py",
        "from captcha_exp.config import ",
        "from captcha_exp.config.schema import PlainConfig\nfrom captcha_exp.config import ",
    )
    project.insert(
        "captcha_exp/config/schema.py",
        "GeneratorConfig: TypeAlias",
        "@dataclass(config=STRICT, frozen=True, kw_only=True)\n"
        "class PlainConfig(BaseGeneratorConfig):\n"
        '    source: Literal["plain"]\n\n\n',
    )
    project.replace(
        "captcha_exp/config/schema.py",
        "= CaptchaLibraryConfig | WheezyLibraryConfig",
        "= CaptchaLibraryConfig | WheezyLibraryConfig | PlainConfig",
    )
    (project.folder / "conf/data/plain.yaml").write_text("defaults: [captcha]\n\nsource: plain\n")

    assert "source: plain" in project.train("data=plain")
