"""The HTTP side: attached to vLLM's FastAPI app by its endpoint-plugin group, so inside CORS and
API-key auth.
"""

from __future__ import annotations

from typing import Any


class FsrEndpointPlugin:
    """Entry point `vllm.endpoint_plugins: fsr`; vLLM loads it only when VLLM_PLUGINS names fsr."""

    name = "fsr"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        from fsr_vllm.params import given_settings, ignoring
        from fsr_vllm.server import config, explain, ignored
        from fsr_vllm.server.middleware import FsrMiddleware

        if ignoring(given_settings(app.state.args.additional_config, named=True)):
            app.include_router(ignored.router)
            return
        app.include_router(config.router)
        app.include_router(explain.router)
        app.add_middleware(FsrMiddleware)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Open the routes' way to the workers; show the default budget on /metrics where it follows
        the load.
        """
        from fsr_vllm import adaptive
        from fsr_vllm.server.explain import open_gate

        if engine_client is not None:
            state.fsr_gate = open_gate(engine_client)
        monitor = adaptive.active()
        if monitor is None:
            return
        if engine_client is None:  # vLLM's render server
            raise RuntimeError(
                "fsr.adaptive needs an engine whose load it can follow; set fsr.budget instead"
            )
        from fsr_vllm.server import load_metrics

        load_metrics.publish(monitor)
