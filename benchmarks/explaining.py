"""How long it takes to explain an update of a long job, and how long the training was up to it.

    python benchmarks/explaining.py [--seconds 120]

Trains CartPole-v1 for so long on a server of its own, then asks for one update at each tenth of the job, one after the
other; each answer starts a program that loads torch, plays on from the newest state before the update, and compares.
"""

import argparse
import time

import time_to_policy


def main() -> None:
    """Train, ask, and print one line for each update."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="how long to train")
    options = parser.parse_args()
    body = {
        "environment": {"kind": "gymnasium", "id": "CartPole-v1"},
        "stop": {"seconds": options.seconds, "target_return": None},
        "seed": 1,
    }
    with time_to_policy.served() as client:
        job = client.post("/v1/training-jobs", json=body).raise_for_status().json()
        path = f"/v1/training-jobs/{job['id']}"
        while not job["is_terminal"]:
            time.sleep(1.0)
            job = client.get(path).raise_for_status().json()
        updates = job["progress"]["updates"]
        columns = client.get(f"{path}/metrics?max_points=10000&keys=rollout_seconds,update_seconds").json()["values"]
        spent = [sum(pair) for pair in zip(columns["rollout_seconds"], columns["update_seconds"], strict=True)]
        print(f"{updates:,} updates, {job['progress']['env_steps']:,} env_steps, {sum(spent):.0f} s of training\n")
        print("| update | training up to it | explained in |\n|---:|---:|---:|")
        for tenth in range(1, 11):
            update = max(1, updates * tenth // 10)
            began = time.perf_counter()
            client.get(f"{path}/updates/{update}?episodes=1").raise_for_status()
            print(f"| {update:,} | {sum(spent[:update]):.0f} s | {time.perf_counter() - began:.1f} s |", flush=True)


if __name__ == "__main__":
    main()
