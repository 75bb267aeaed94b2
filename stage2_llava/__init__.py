"""Stage 2: plug a vision tower into LLaVA and train it with PEFT."""
