"""diffgen: guidance, fine-tuning and evaluation for diffusers pipelines."""
