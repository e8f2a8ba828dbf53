"""Speed and memory beside a plain PyTorch peer measured in the same run; no part of the package."""
