"""Training stages (pretrain, sft, engagement, dpo) on one loop under DeepSpeed."""

from recipes.interrupt import catch_interrupts
from recipes.openmp import sleep_while_waiting

catch_interrupts()
sleep_while_waiting()
