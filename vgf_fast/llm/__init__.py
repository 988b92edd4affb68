"""Test-time alignment of a language model with a reward model: the sampled responses are particles.

Importing this imports no transformers; models are the caller's own objects.
"""

import importlib.util
import sys
from pathlib import Path

# transformers takes any folder called kernels on the path for Hugging Face's package: run from a checkout's root, that
# is this library's source folder, whose import fails. None in sys.modules makes it "not installed".
_found = importlib.util.find_spec("kernels") if "kernels" not in sys.modules else None
if _found is not None and _found.origin and Path(_found.origin).parent == Path(__file__).parents[2] / "kernels":
    sys.modules["kernels"] = None  # type: ignore[assignment]

from vgf_fast.config import TransportBudget  # noqa: E402
from vgf_fast.llm.aligner import TokenBudget  # noqa: E402
from vgf_fast.llm.baselines import BestOfN, TokenSearch, compare, summary  # noqa: E402
from vgf_fast.llm.decoding import Decoding  # noqa: E402
from vgf_fast.llm.embedding_flow import EmbeddingFlow  # noqa: E402
from vgf_fast.llm.latent import LatentFlow  # noqa: E402
from vgf_fast.llm.reference_model import ReferenceModel  # noqa: E402
from vgf_fast.llm.result import AlignResult, Response, Transport, Usage  # noqa: E402
from vgf_fast.llm.reward import CallableReward, Reward, RewardModel  # noqa: E402

__all__ = [
    "AlignResult",
    "BestOfN",
    "CallableReward",
    "Decoding",
    "EmbeddingFlow",
    "LatentFlow",
    "ReferenceModel",
    "Response",
    "Reward",
    "RewardModel",
    "TokenBudget",
    "TokenSearch",
    "Transport",
    "TransportBudget",
    "Usage",
    "compare",
    "summary",
]
