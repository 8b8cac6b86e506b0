"""A compiled model as a transformers model: `generate`, pipelines, Auto classes, Trainer, PEFT.

Imported by `LinearizedModel.to_transformers()`, or when transformers loads its Auto classes after `import linearize`.
"""
