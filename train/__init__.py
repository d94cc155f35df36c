"""Training stages (pretrain, sft, engagement, dpo) on one loop under DeepSpeed."""
