"""A user's own worker extension, knowing nothing of ours: reads signals for given pixels off the model in a worker."""

from base64 import b64decode

import torch


class ProbeExtension:
    @torch.inference_mode()
    def probe_signals(self, pixels: str, question: str) -> dict[str, list[float]]:
        """Saliency, attention received and relevance of one image, whose float32 pixels come as base64."""
        model = self.model_runner.get_model()
        values = torch.frombuffer(bytearray(b64decode(pixels)), dtype=torch.float32).view(1, 3, 336, 336)
        names = ("saliency", "received", "shallow_received@8")
        model.fsr_tap.wanted = frozenset(names)
        features, projected = model.fsr_project(model.fsr_tower(values))
        model.fsr_tap.wanted = frozenset()
        relevance = model.fsr_text.relevance(features, projected, [question])
        signals = model.fsr_tap.take()
        return {name: signals[name][0].tolist() for name in names} | {"relevance": relevance[0].tolist()}
