"""Check which attention back ends and kernels run on this machine: python -m model.doctor."""

from recipes.interrupt import catch_interrupts

catch_interrupts()
