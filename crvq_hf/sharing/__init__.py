"""What goes with a quantized model to others: its report, pictures, model card, and the upload.

`report` writes report.json and report.html, `figures` draws the picture in it, `card` makes the model card of both,
and `hub` uploads. `text` puts sizes and tables into words. Nothing here tells the user's paths or texts.

Called by the quantizer for `push_to_hub`, and by `commands`.
"""
