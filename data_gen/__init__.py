"""Cold-start data: text reasoning in, code-augmented traces out, every block executed and every answer verified."""
