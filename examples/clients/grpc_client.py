"""The generated gRPC stubs against a running service: experts, an answer, a stream with its routing, an error.

Usage: python examples/clients/grpc_client.py [HOST:PORT]
"""

from __future__ import annotations

import os
import sys

import grpc

from meteora_dist.serving.proto.meteora.v1 import inference_pb2 as pb
from meteora_dist.serving.proto.meteora.v1.inference_pb2_grpc import InferenceStub

target = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9000"
key = os.environ.get("METEORA_API_KEY")
metadata = [("authorization", f"Bearer {key}")] if key else []

with grpc.insecure_channel(target) as channel:
    stub = InferenceStub(channel)
    listed = stub.ListExperts(pb.ListExpertsRequest(), metadata=metadata)
    print(f"{listed.base_model}: top-{listed.default_top_k} of", ", ".join(expert.name for expert in listed.experts))

    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="I have a peach and two plums. How many fruits?")])
    greedy = pb.Sampling(temperature=0)
    named = pb.GenerateRequest(model=listed.experts[0].name, chat=chat, sampling=greedy, max_tokens=8)
    reply = stub.Generate(named, metadata=metadata, timeout=60)
    print(f"{reply.model}: {reply.choices[0].text!r}, {reply.usage.completion_tokens} tokens")

    blend = pb.Routing(
        mode=pb.MODE_BLEND,
        experts=[pb.ChosenExpert(name=expert.name, weight=0.5) for expert in listed.experts[:2]],
        trace=True,
    )
    request = pb.GenerateRequest(prompt="The capital of France is", sampling=greedy, max_tokens=8, routing=blend)
    for part in stub.GenerateStream(request, metadata=metadata, timeout=60):
        print(f"  {part.choice.text!r}", part.choice.routing.dominating)

    try:
        stub.Generate(pb.GenerateRequest(model="nobody", chat=chat), metadata=metadata, timeout=60)
    except grpc.RpcError as error:
        print("refused:", error.code().name, "-", error.details())
