//! Mistakes with clusters, in `tests/kernels/sm90/cluster_sm90.cu`.

use crate::common::{random, values};
use crate::device::{launch_all, Device, Memory};
use crate::harness::*;
use candle_core::{DType, Result};
use candle_sam_lora::launch::tensor_map::{Element, TensorMap};
use candle_sam_lora::launch::Launch;

const FILE: &str = "cluster_sm90.cu";
const STEPS: usize = 7;

const CLUSTER: Subject = Subject {
    name: "cluster_sm90",
    source: Source::File("sm90/cluster_sm90.cu"),
    modes: timings_and_products,
    run: |device| vec![run(device, 2)],
    right_up_to: 1e-4,
    wrong_above: 1e-4,
};
const WITHOUT: Subject = Subject { run: |device| vec![run(device, 1)], ..CLUSTER };
const OF_FOUR: Subject = Subject { run: |device| vec![run(device, 4)], ..CLUSTER };

/// A launch of two blocks, in clusters of `cluster` blocks.
fn run(device: &Device, cluster: u32) -> Result<f64> {
    let input = random(1, (STEPS, 16 * 32));
    let expected = values(&input.sum(0)?.repeat(2)?);
    let input = Memory::from_tensor(&input);
    let matrix = (16 * STEPS as u32, 32, 32);
    let map = TensorMap::unswizzled(input.address(), Element::Bits32, matrix, (8, 32))?;
    let out = Memory::for_elements(2 * 16 * 32, DType::F32);
    let launch = Launch {
        kernel: "cluster_sm90".to_string(),
        grid: [2, 1, 1],
        block: [64, 1, 1],
        shared_bytes: 5120,
        cluster,
        params: params(1, &[out.address(), STEPS as u64, 0, 0, 0, 0, 0, 0]),
        tensor_maps: vec![(0, map)],
        ..Default::default()
    };
    launch_all(device, &[launch])?;
    Ok(error(&out.values(DType::F32), &expected))
}

const FIRST_BARRIER: &str = "ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();  // both blocks have initialised their barriers";
const LAST_WAIT: &str = "for (uint32_t step = steps; step < steps + 2; ++step)  // the other block has given back its last stages, here too
            ptx::mbarrier_wait_parity(shared.empty[step % 2], step / 2 % 2 ^ 1);";

#[rustfmt::skip]
pub const TABLE: &[(Subject, &[Bug])] = &[
    (CLUSTER, &[
        UNHARMED,
        Bug { name: "a block that ends before the other's last arrivals", file: FILE,
              seen: &[reported(&["has ended", FILE])],
              old: LAST_WAIT, new: "" },
        Bug { name: "a block that ends before the other's last arrival", file: FILE,
              seen: &[reported(&["has ended", FILE])],
              old: "step < steps + 2; ++step)", new: "step < steps + 1; ++step)" },
        // A relaxed barrier orders no arrivals.
        Bug { name: "a relaxed barrier after the last arrivals", file: FILE, seen: &[reported(&["has ended", FILE])],
              old: LAST_WAIT, new: "ptx::cluster_arrive_relaxed(); ptx::cluster_wait();" },
        Bug { name: "another block's barriers before the cluster has met", file: FILE,
              seen: &[reported(&["of block", "without a barrier of the cluster after its mbarrier.init"])],
              old: FIRST_BARRIER, new: "__syncthreads();" },
        Bug { name: "no fence between init and the cluster's barrier", file: FILE,
              seen: &[reported(&["without fence.mbarrier_init"])],
              old: "// a warp of each block reads what is loaded here
                      }
                      ptx::fence_mbarrier_init();",
              new: "}" },
        Bug { name: "a multicast to a block that the cluster does not have", file: FILE,
              seen: &[reported(&["multicast", "names block 2 of a cluster of 2"])],
              old: "shared.full[stage], 3, 0", new: "shared.full[stage], 7, 0" },
        Bug { name: "an arrival at a block that the cluster does not have", file: FILE,
              seen: &[reported(&["names block 2 of a cluster of 2"])],
              old: "if (lane < 2)", new: "if (lane < 3)" },
        Bug { name: "a stage that waits for one block alone", file: FILE, seen: &[reported(&[])],
              old: "ptx::mbarrier_init(shared.empty[i], 2);", new: "ptx::mbarrier_init(shared.empty[i], 1);" },
        // The other block may not have read the memory that is overwritten.
        Bug { name: "a stage given back to the own block alone", file: FILE, seen: &[caught(early_unordered)],
              old: "if (lane < 2) ptx::mbarrier_arrive_cluster(shared.empty[stage], lane);",
              new: "if (lane < 2) ptx::mbarrier_arrive(shared.empty[stage]);" },
        Bug { name: "a block that expects the bytes of its own half alone", file: FILE, seen: &[caught(always)],
              old: "sizeof(shared.tiles[0])", new: "sizeof(shared.tiles[0]) / 2" },
        Bug { name: "two arrivals at the cluster's barrier", file: FILE,
              seen: &[reported(&["barrier.cluster.arrive twice"])],
              old: FIRST_BARRIER, new: "ptx::cluster_arrive_relaxed(); ptx::cluster_arrive_relaxed();" },
        Bug { name: "a wait without an arrival at the cluster's barrier", file: FILE,
              seen: &[reported(&["barrier.cluster.wait without barrier.cluster.arrive"])],
              old: FIRST_BARRIER, new: "ptx::cluster_wait();" },
        // Between arrival and wait the barrier orders nothing.
        Bug { name: "work between arrival and wait", file: FILE,
              seen: &[reported(&["between barrier.cluster.arrive and wait"])],
              old: "} else if (threadIdx.x >= kWarp) { float sums[16] = {};",
              new: "} else if (threadIdx.x >= kWarp) { float sums[16] = {}; ptx::cluster_arrive_relaxed();" },
    ]),
    (WITHOUT, &[
        Bug { name: "a launch without clusters", seen: &[reported(&["names block 1 of a cluster of 1"])], ..UNHARMED },
    ]),
    (OF_FOUR, &[
        Bug { name: "a launch of half a cluster", seen: &[reported(&["a grid of 2 blocks"])], ..UNHARMED },
    ]),
];
