"""The networks behind LPIPS, FID and ImageReward, in plain PyTorch and transformers.

They load the published weight files and need no torchvision, whose wheels fit one build of torch.
"""
