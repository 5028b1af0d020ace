"""Real photographs that come inside scikit-image's wheel: nothing is downloaded."""

import base64
import io
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

# The photographs in scikit-image's data folder, under its own names; its other files are patterns
# and scans.
_FILES = {
    "astronaut": "astronaut.png",
    "camera": "camera.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "hubble": "hubble_deep_field.jpg",
    "motorcycle": "motorcycle_left.png",
    "rocket": "rocket.jpg",
}


def photos() -> dict[str, Image.Image]:
    """The bundled photographs by name, as RGB images of their own sizes.

    Errors: ImportError when scikit-image is not installed.
    """
    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the bundled photographs are scikit-image's: pip install scikit-image")
    # Read as files: skimage.data would import scipy, and would fetch what a future wheel no longer
    # holds.
    folder = Path(spec.submodule_search_locations[0]) / "data"
    return {
        name: _open(folder / file) for name, file in _FILES.items() if (folder / file).is_file()
    }


def data_url(
    image: Image.Image, format: str = "JPEG", size: int | tuple[int, int] | None = None
) -> str:
    """The image as a data: URL for a chat message; `size` scales it to (width, height), or to that
    longest side.
    """
    if isinstance(size, int):
        scale = size / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if size is not None:
        image = image.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, format)
    return (
        f"data:{Image.MIME[format.upper()]};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    )


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
