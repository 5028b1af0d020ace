"""The HTTP side: attached to vLLM's app by its endpoint-plugin group, so inside CORS and auth."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # vLLM loads entry points in processes that serve nothing
    from fsr_vllm.compat.types import App, EngineClient, Namespace


class FsrEndpointPlugin:
    """Entry point `vllm.endpoint_plugins: fsr`; vLLM loads it only when VLLM_PLUGINS names fsr."""

    name = "fsr"
    required_tasks = None

    def attach_router(self, app: App) -> None:
        """Add our routes and the middleware; of a server that ignores, only what says so."""
        from fsr_vllm.params import given_settings, ignoring
        from fsr_vllm.server import config, openapi, routes
        from fsr_vllm.server.middleware import FsrMiddleware

        if ignoring(given_settings(app.state.args.additional_config, named=True)):
            app.include_router(config.ignored_router)
            return
        app.include_router(config.router)
        app.include_router(routes.router)
        app.add_middleware(FsrMiddleware)
        openapi.describe_fields(app)

    async def init_state(self, engine_client: EngineClient, state: App, args: Namespace) -> None:
        """Open the routes' way to the workers; show a budget that follows the load on /metrics."""
        from fsr_vllm import adaptive
        from fsr_vllm.server import metrics, routes

        if engine_client is not None:
            state.fsr_gate = routes.open_gate(engine_client)
        monitor = adaptive.active()
        if monitor is None:
            return
        if engine_client is None:  # vLLM's render server
            raise RuntimeError(
                "fsr.adaptive needs an engine whose load it can follow; set fsr.budget instead"
            )
        metrics.publish(monitor)
