"""One of two tensor-parallel ranks, run as a program: prunes an image whose saliencies nearly tie.

The rank is told which of two patches comes first; printed are the places and the rows that it ends
with.
"""

import json
import sys

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state

from fsr_vllm.engine.selection import Inputs, Selector
from fsr_vllm.engine.stats import Counts
from fsr_vllm.engine.types import EncodedImage
from fsr_vllm.params import ImagePlan


def main(rank: int, address: str) -> None:
    import torch

    from .fake import FakeWorker

    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(2, rank, address, rank, "gloo")
        parallel_state.initialize_model_parallel(2, 1)
    saliency = torch.tensor([5.0, 1.0, 1.0, 0.0])
    saliency[1 + rank] += 1e-6  # rank 0 sees patch 1 ahead of patch 2, rank 1 the other way round
    image = EncodedImage(torch.arange(8.0).view(4, 2), {"saliency": saliency}, grids=(None,))
    selector = Selector(FakeWorker(), Inputs(), Counts())
    pruned = selector.select([image], [ImagePlan(4, 2, "fastervlm")])[0]
    print(json.dumps([pruned.indices.tolist(), pruned.tokens.tolist()]))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
