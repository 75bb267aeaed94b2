"""The miniature: a drawn world, a mini CLIP and a mini Stable Diffusion, so that everything runs without weights."""
