"""The torch bridge: the theory held against one's own network, and heads, data and a loop to train with. It alone needs torch."""

try:
    import torch as torch
except ImportError as error:
    raise ImportError("ufm.bridge needs torch; install the extra: pip install ufm[torch]") from error
