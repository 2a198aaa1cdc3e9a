"""Makes a tiny random Llama with a chat template in the folder `dense`; its argument is the folder of tiny.py."""

import sys

sys.path.insert(0, sys.argv[1])

from tiny import tiny_model, tiny_tokenizer  # noqa: E402

tiny_model(hidden_size=256, intermediate_size=512).save_pretrained("dense")
tokenizer = tiny_tokenizer()
tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
tokenizer.save_pretrained("dense")
