"""This comparison: presets, stages, records to tables, figures, sentences and claims; explore; command line."""
