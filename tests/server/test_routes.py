"""The plugin's routes on an app of FastAPI, with an engine client of the test's own."""

import asyncio
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI, Header
from prometheus_client import REGISTRY
from pydantic import BaseModel

import fsr_vllm
from fsr_vllm import adaptive
from fsr_vllm.methods import list_methods
from fsr_vllm.params import REQUEST_FIELDS, build_method
from fsr_vllm.server import FsrEndpointPlugin, metrics, openapi

from .hooked import configured


class Chat(BaseModel):
    """A request model, as vLLM's."""

    model: str


class Batch(Chat):
    """Another one of the same endpoint."""


class Client:
    """An engine client with one worker."""

    def __init__(self, settings, unsupported=None, processor=None):
        model_config = configured(settings, unsupported)
        self.renderer = SimpleNamespace(model_config=model_config, mm_processor=processor)
        self.errored, self.engine_core, self.asked, self.fails = False, None, [], None

    async def collective_rpc(self, method, args):
        """The worker's answer."""
        self.asked.append((method, args))
        if self.fails is not None:
            raise self.fails
        return [{"images": 3}]


PROCESSOR = SimpleNamespace(fsr_stats=lambda: {"images": 2}, fsr_methods=lambda: ["fsr", "random"])


def application(client, additional_config=None, renders=None):
    """An app with the plugin's routes, and its state."""
    app = FastAPI()
    app.state.args = SimpleNamespace(additional_config=additional_config)
    app.state.engine_client = client
    app.state.online_renderer = SimpleNamespace(renderer=renders)

    @app.post("/v1/chat/completions")
    async def chat(body: Chat | Batch, x: str = Header("")):
        return {}

    @app.post("/v1/completions")
    async def complete(body: Chat):
        return {}

    @app.get("/v1/messages")
    async def messages():
        return {}

    plugin = FsrEndpointPlugin()
    plugin.attach_router(app)
    asyncio.run(plugin.init_state(client, app.state, None))
    return app


def get(app, path, status=200):
    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.get(path)

    answer = asyncio.run(ask())
    assert answer.status_code == status
    return answer


def test_the_configuration_of_a_server_with_bounds():
    settings = {
        "min_budget": 16, "max_budget": 128, "budget": 0.1, "tokens_per_image": 576,
        "detail_budgets": {"low": 32}, "text_encoder": "a/b@main", "encoder_limit": "kept",
    }  # fmt: skip
    found = get(application(Client(settings, processor=PROCESSOR)), "/v1/fsr/config").json()
    assert found.pop("options")["alpha"] == build_method("fsr", None).alpha
    assert found == {
        "object": "fsr.config",
        "version": fsr_vllm.__version__,
        "ignored": False,
        "prunes": True,
        "min_budget": 16,
        "max_budget": 128,
        "default_budget": 0.1,
        "default_tokens": 58,
        "adaptive": None,
        "detail_budgets": {"low": 32},
        "tokens_per_image": 576,
        "one_size": True,
        "method": "fsr",
        "methods": ["fsr", "random"],
        "text_encoder": "a/b@main",
        "model_alias": False,
        "encoder_limit": "kept",
    }


def test_the_configuration_where_little_is_known(tmp_path):
    settings = {"adaptive": "64:288", "text_encoder": str(tmp_path) + "/"}
    app = application(Client(settings, "no tower", PROCESSOR))
    found = get(app, "/v1/fsr/config").json()
    assert (found["prunes"], found["methods"], found["min_budget"]) == (False, [], 1)
    assert (found["adaptive"], found["default_budget"]) == ({"low": 64, "high": 288}, 288)
    assert (found["default_tokens"], found["text_encoder"]) == (None, tmp_path.name)
    stock = get(application(Client({"budget": 64})), "/v1/fsr/config").json()
    assert (stock["prunes"], stock["methods"]) == (False, [])
    known = {"object": "fsr.config", "version": fsr_vllm.__version__, "prunes": False}
    inactive = get(application(Client(None, processor=PROCESSOR)), "/v1/fsr/config").json()
    assert inactive == {**known, "ignored": False}
    ignoring = application(Client(None), {"fsr": {"ignore": True, "budget": "nonsense"}})
    assert get(ignoring, "/v1/fsr/config").json() == {**known, "ignored": True}
    get(ignoring, "/v1/fsr/methods", 404)
    assert "fsr_budget" not in get(ignoring, "/openapi.json").text


def test_methods_are_listed_with_their_licence():
    listed = get(application(Client({})), "/v1/fsr/methods").json()
    assert listed["object"] == "list"
    assert [each["id"] for each in listed["data"]] == list(list_methods())
    first = listed["data"][0]
    assert first["license"] == list_methods()["fsr"].license
    assert "licence" not in first
    assert {"needs", "uses", "query_aware", "paper", "fidelity", "servable"} <= first.keys()


def test_statistics_ask_the_workers_through_the_gate():
    client = Client({}, processor=PROCESSOR)
    app = application(client)
    found = get(app, "/v1/fsr/stats").json()
    assert found["images"] == 2
    assert found["workers"] == [{"images": 3}]
    assert found["worker_calls"]["sent"] == 1
    assert client.asked == [("fsr_stats", ())]
    client.errored = True
    refused = get(app, "/v1/fsr/stats", 503)
    assert refused.json()["error"]["message"].startswith("the engine has died")
    assert refused.json()["error"]["code"] == 503
    assert "retry-after" not in refused.headers
    other = Client({})
    other.fails = AttributeError("another extension")
    assert get(application(other), "/v1/fsr/stats").json()["workers"] is None


def test_an_engine_that_dies_meanwhile_is_a_503():
    client = Client({})

    async def dies(method, args):
        client.errored = True
        raise RuntimeError("died")

    client.collective_rpc = dies
    assert "has died" in get(application(client), "/v1/fsr/stats", 503).text


def test_late_workers_are_a_503_with_the_time_to_come_again(monkeypatch):
    from fsr_vllm.server import gate, routes

    monkeypatch.setattr(
        routes,
        "WorkerGate",
        lambda call, dead: gate.WorkerGate(call, dead, timeout=0.001),
    )
    client = Client({})

    async def never(method, args):
        await asyncio.Event().wait()

    client.collective_rpc = never
    late = get(application(client), "/v1/fsr/stats", 503)
    assert "no answer of the workers" in late.json()["error"]["message"]
    assert "retry-after" in late.headers


def test_a_server_that_only_renders_has_no_workers():
    renderer = SimpleNamespace(model_config=configured({}), mm_processor=PROCESSOR)
    assert get(application(None, renders=renderer), "/v1/fsr/stats").json() == {
        "images": 2,
        "workers": None,
    }


def test_a_budget_by_load_is_shown_and_needs_an_engine(monkeypatch):
    clock = [0.0]
    monitor = adaptive.LoadMonitor(64, 288, clock=lambda: clock[0])
    monkeypatch.setattr(adaptive, "_active", monitor)
    with pytest.raises(RuntimeError, match="needs an engine"):
        application(None)
    application(Client({"adaptive": "64:288"}))

    def seen(name, **labels):
        return REGISTRY.get_sample_value(name, labels)

    down = seen("fsr_adaptive_changes_total", direction="down")
    up = seen("fsr_adaptive_changes_total", direction="up")
    assert seen("fsr_adaptive_budget") == 288
    monitor.read(0, adaptive.Load(0, 100))
    clock[0] += 5.0
    monitor.read(0, adaptive.Load(0, 100))
    assert seen("fsr_adaptive_budget") == 64
    assert seen("fsr_adaptive_changes_total", direction="down") == down + 1
    assert seen("fsr_adaptive_changes_total", direction="up") == up
    monitor.read(0, adaptive.Load())
    clock[0] += 1000.0
    monitor.read(0, adaptive.Load())
    assert seen("fsr_adaptive_budget") == 288
    assert seen("fsr_adaptive_changes_total", direction="up") == up + 1
    metrics.publish(monitor)  # twice, as of two servers in a process


def test_the_schema_has_our_fields_on_endpoints_with_images_alone():
    app = application(Client({}))
    schema = get(app, "/openapi.json").json()
    assert schema == get(app, "/openapi.json").json()  # added once
    for name in ("Chat", "Batch"):
        properties = schema["components"]["schemas"][name]["properties"]
        assert list(properties) == ["model", *REQUEST_FIELDS]
    chat, other = (schema["paths"][f"/v1/{path}"] for path in ("chat/completions", "completions"))
    assert [each["name"] for each in chat["post"]["parameters"]] == ["x", "x-fsr-budget"]
    assert "parameters" not in other["post"]
    assert "parameters" not in schema["paths"]["/v1/messages"]["get"]


def test_the_schema_of_an_app_that_knows_nothing_of_images():
    app = FastAPI()
    openapi.describe_fields(app)
    assert app.openapi()["paths"] == {}

    @app.post("/v1/messages")
    async def no_body():
        return {}

    app.openapi_schema = None
    post = app.openapi()["paths"]["/v1/messages"]["post"]
    assert [each["name"] for each in post["parameters"]] == ["x-fsr-budget"]
