"""Training stages (pretrain, sft, engagement, dpo) on one loop under DeepSpeed."""

from recipes.openmp import sleep_while_waiting

sleep_while_waiting()
