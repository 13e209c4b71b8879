"""What a step costs the host besides copying records: its order, choices and positions."""

import statistics
import time

from latent_t2i.shards.order import Epochs, choices, share
from latent_t2i.train.batches import make_positions


def measure_order_and_draws_ms(order: Epochs, num_processes: int = 1, num_steps: int = 50) -> float:
    """Returns the median time of a process's step, in ms.

    The steps are spread over an epoch. The first is not counted, because it builds what all share.
    Noise, timesteps and dropout are drawn on the device and cost the host of a GPU nothing here.
    """
    mine = share(order.batch_size, num_processes - 1, num_processes)
    stride = max(1, order.num_steps(1) // num_steps)
    times_s = []
    for step in range(0, (num_steps + 1) * stride, stride):
        start_s = time.perf_counter()
        records = order.records(step)[mine]
        caption_u, view_u = (u[mine] for u in choices(order.seed, step, order.batch_size))
        positions = make_positions(step, mine)
        times_s.append(time.perf_counter() - start_s)
        assert len(records) == len(caption_u) == len(view_u) == len(positions)
    return 1e3 * statistics.median(times_s[1:])
