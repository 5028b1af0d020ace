"""One thin file per model family. This table is all that `register()` needs, and imports none of
them.
"""

FAMILIES = {
    "LlavaForConditionalGeneration": "fsr_vllm.engine.models.llava:FsrLlavaForConditionalGeneration",
}
