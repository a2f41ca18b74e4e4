"""`transformers serve`: its server answers from a patched model as from the unpatched one."""

import base64
import io
from pathlib import Path

import pytest
from transformers.cli.serve import Serve

import ras_fast
from ras_fast.evaluation import tinyworld

uvicorn = pytest.importorskip("uvicorn")
TestClient = pytest.importorskip("starlette.testclient").TestClient
pytest.importorskip("openai")

TINY = str(Path(ras_fast.__file__).parent / "assets/tiny-llava")


def served(**options):
    """What `transformers serve` builds before it listens."""
    return Serve(TINY, device="cpu", dtype="float32", **options)


def ask(client, item):
    """The answer of the chat endpoint to an item of the test split."""
    content = [{"type": "text", "text": item.question}]
    if item.image is not None:
        png = io.BytesIO()
        item.image.save(png, "PNG")
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    body = {"model": TINY, "messages": [{"role": "user", "content": content}], "max_tokens": 12}
    return client.post("/v1/chat/completions", json=body).raise_for_status().json()["choices"][0]["message"]["content"]


@pytest.fixture(autouse=True)
def _no_socket(monkeypatch):
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: None)


def test_a_served_model_may_be_patched():
    serve, items = served(), list(tinyworld.split("test", 6))
    (loaded,) = serve._model_manager.loaded_models.values()
    with TestClient(serve.server.config.app) as client:
        expected = [ask(client, item) for item in items]
        with ras_fast.patch(loaded.model) as patched:
            for item, answer in zip(items, expected, strict=True):
                assert ask(client, item) == answer
                assert patched.region_map.num_regions == (item.image is not None)
    assert patched.report().unfused == {}
    assert len(set(expected)) > 3


def test_the_command_line_takes_no_attention_but_its_own():
    with pytest.raises(ValueError, match="Unsupported attention implementation: 'ras_fast'"):
        served(attn_implementation="ras_fast")
