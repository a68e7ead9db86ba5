"""OpenAI's client against a running service: all ways to choose experts, a stream, and the routing of an answer.

Usage: python examples/clients/openai_client.py [BASE_URL]
"""

from __future__ import annotations

import os
import sys

from openai import NotFoundError, OpenAI
from openai.types.chat import ChatCompletionMessageParam

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
client = OpenAI(base_url=url, api_key=os.environ.get("METEORA_API_KEY", "none"))
question: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "I have a peach, two trumpets and an apple. How many fruits do I have?"}
]

names = [model.id for model in client.models.list()]
experts = [name for name in names if name not in ("auto", "auto-sequence", "base")]
print("experts:", ", ".join(experts))

blend = ",".join(f"{name}:0.5" for name in experts[:2])
for model in ("auto", "auto-sequence", "base", experts[0], blend):
    reply = client.chat.completions.create(model=model, messages=question, temperature=0, max_tokens=8)
    print(f"{model}: {reply.choices[0].message.content!r}, {reply.choices[0].finish_reason}")

print("streamed: ", end="")
for chunk in client.chat.completions.create(
    model="auto", messages=question, temperature=0, max_tokens=8, stream=True, stream_options={"include_usage": True}
):
    if chunk.usage:
        print(f" ({chunk.usage.completion_tokens} tokens)")
    for choice in chunk.choices:
        print(choice.delta.content, end="")

# What OpenAI's client does not know goes into extra_body, and comes back in model_extra.
traced = client.chat.completions.create(
    model="auto", messages=question, temperature=0, max_tokens=8, extra_body={"routing": {"trace": True, "top_k": 1}}
)
routing = (traced.choices[0].model_extra or {})["routing"]
print("dominating expert:", routing["dominating"])
for token in routing["tokens"]:
    share = max(token["shares"])
    print(f"  {token['token']!r}: {routing['experts'][token['shares'].index(share)]} {share:.2f}")

try:
    client.chat.completions.create(model="nobody", messages=question)
except NotFoundError as error:
    print("refused:", error.code, "-", error.message)
