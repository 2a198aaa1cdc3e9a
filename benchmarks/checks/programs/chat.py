"""Asks a server, given by its URL, with the openai client: for an answer in one piece, then for a stream."""

import sys

import openai

url, name, prompt = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
question = {"model": name, "messages": [{"role": "user", "content": prompt}], "max_tokens": 8, "temperature": 0}

answer = client.chat.completions.create(**question)
print("plain", repr(answer.choices[0].message.content))

chunks = client.chat.completions.create(**question, stream=True)
pieces = [piece for chunk in chunks if (piece := chunk.choices[0].delta.content)]
print("streamed", repr("".join(pieces)))
print("pieces", len(pieces))
