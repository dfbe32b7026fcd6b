"""Getting the accuracy back: BN recalibration, fine-tuning, distillation."""
