"""Stage 1: post-training a vision tower with Diffusion Contrastive Reconstruction."""
