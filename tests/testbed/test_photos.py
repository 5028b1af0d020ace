"""The photographs that tests and benchmarks ask about."""

import base64
import io

from PIL import Image

from benchmarks.testbed import data_url, photos


def test_photos_and_data_urls():
    pictures = photos()
    assert {"astronaut", "camera", "chelsea", "coffee", "rocket"} <= set(pictures)
    assert all(image.mode == "RGB" and min(image.size) >= 300 for image in pictures.values())

    def decode(url):
        head, _, body = url.partition(",")
        return head, Image.open(io.BytesIO(base64.b64decode(body)))

    cat = pictures["chelsea"]
    head, image = decode(data_url(cat, "PNG"))
    assert head == "data:image/png;base64" and image.tobytes() == cat.tobytes()
    head, image = decode(data_url(cat, size=100))
    assert head == "data:image/jpeg;base64" and image.size == (100, 67)
    assert decode(data_url(cat, size=(64, 32)))[1].size == (64, 32)
