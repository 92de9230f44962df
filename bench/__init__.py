"""Measurements and demonstrations of adamem_fused; not part of the installed package."""
