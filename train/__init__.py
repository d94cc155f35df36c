"""Training stages (pretrain, sft, engagement, dpo) on one loop under DeepSpeed."""

from recipes.interrupt import catch_interrupts
from recipes.openmp import limit_spinning

catch_interrupts()
limit_spinning()
