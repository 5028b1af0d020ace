"""A user's own worker extension: reads signals and the work of engine steps off the model in a
worker.
"""

from base64 import b64decode

import torch

from fsr_vllm.engine.types import ImageInput
from fsr_vllm.engine.wire import pack_plan, unpack_plan
from fsr_vllm.params import ImagePlan


class ProbeExtension:
    @torch.inference_mode()
    def probe_signals(self, pixels: str, question: str) -> dict[str, list[float]]:
        """Saliency, attention received and relevance of one image, whose float32 pixels come as
        base64.
        """
        model = self.model_runner.get_model()
        values = torch.frombuffer(bytearray(b64decode(pixels)), dtype=torch.float32).view(
            1, 3, 336, 336
        )
        names = ("saliency", "received", "shallow_received@8")
        worker, plan = model.fsr.worker, ImagePlan(576, 576)
        image = ImageInput({"pixel_values": values[0]}, plan)
        encoded = worker.rows(worker.features([image], frozenset(names)), frozenset())[0]
        relevance = model.fsr_text.relevance(encoded.tower[None], encoded.rows[None], [question])
        return {name: encoded.signals[name].tolist() for name in names} | {
            "relevance": relevance[0].tolist()
        }

    @torch.inference_mode()
    def probe_rows(self, part: str, question: str) -> dict[str, list]:
        """Rows, signals and relevance of a photograph that `families.picture` makes, with the tile
        and patch of each row, by the worker half and the checkpoint's image processor.
        """
        from transformers import AutoProcessor

        from .families import picture

        model = self.model_runner.get_model()
        worker, pruner = model.fsr.worker, model.fsr
        names = ("saliency", "received", "shallow_saliency@5", "keys")
        processor = AutoProcessor.from_pretrained(self.model_runner.model_config.model)
        kwargs = dict(processor.image_processor([picture(part)], return_tensors="pt"))
        plan = ImagePlan(1, 1, question=question)
        image = worker.inputs(kwargs, [pack_plan(None, plan)])[0]
        wanted = frozenset(names)
        (encoded,) = worker.rows(worker.features([image], wanted), wanted | {"metric"})
        text = pruner.selector._inputs.relevance
        (relevance,) = pruner.selector._relevance(text, [(encoded, question)])
        signals = {name: encoded.signals[name].tolist() for name in (*names, "metric")}
        found = {"rows": encoded.rows.tolist(), "relevance": relevance.tolist(), **signals}
        return found | {"patches": encoded.patches.tolist()}

    def probe_steps(self) -> list[int]:
        """Unpruned tokens that each engine step so far gave the model to encode; starts to watch
        when first called.
        """
        model = self.model_runner.get_model()
        if not hasattr(self, "probed_steps"):
            self.probed_steps: list[int] = []
            stock = model.embed_multimodal

            def watched(**kwargs):
                self.probed_steps.append(
                    sum(unpack_plan(plan)[1].total for plan in kwargs["fsr_plan"])
                )
                return stock(**kwargs)

            model.embed_multimodal = watched
        return self.probed_steps
