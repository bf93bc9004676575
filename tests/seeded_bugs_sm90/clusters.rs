//! Mistakes with clusters, planted in copies of `tests/kernels/sm90/cluster_sm90.cu`, one at a time.

use crate::common::{error, random, values};
use crate::device::{encode, Memory};
use crate::{assert_reported, assert_seen, emulator, Outcomes, TOLERANCE};
use candle_core::DType;
use candle_sam_lora::launch::tensor_map::{Element, Swizzle, TensorMap};
use candle_sam_lora_emulator::{Launch, Mode, Timing};

const CLUSTER: &str = "cluster_sm90.cu";
const STEPS: usize = 7;
const FIRST_BARRIER: &str = "    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();  // both blocks have initialised their barriers
";
const LAST_WAIT: &str = "        for (uint32_t step = steps; step < steps + 2; ++step)  // the other block has given back its last stages, here too
            ptx::mbarrier_wait_parity(shared.empty[step % 2], step / 2 % 2 ^ 1);
";

fn run(name: &str, original: &str, planted: &str) -> Outcomes {
    run_clusters(name, original, planted, 2)
}

fn run_clusters(name: &str, original: &str, planted: &str, cluster: u32) -> Outcomes {
    let emulator = emulator(name, CLUSTER, original, planted);
    let input = random(1, (STEPS, 16 * 32));
    let expected = values(&input.sum(0).unwrap().repeat(2).unwrap());
    let input = Memory::from_tensor(&input);
    let map = TensorMap {
        address: input.address(),
        element: Element::Bits32,
        dims: vec![32, 16 * STEPS as u32],
        strides: vec![4 * 32],
        tile: vec![32, 8],
        swizzle: Swizzle::None,
    };
    let outcome = |mode: Mode| {
        let out = Memory::for_elements(2 * 16 * 32, DType::F32);
        let mut params = encode(&map).unwrap().to_vec();
        for word in [out.address(), STEPS as u64, 0, 0, 0, 0, 0, 0] {
            params.extend(word.to_ne_bytes());
        }
        let (grid, block, shared_bytes) = ([2, 1, 1], [64, 1, 1], 5120);
        let kernel = "cluster_sm90";
        let launch = Launch {
            kernel,
            grid,
            block,
            shared_bytes,
            cluster,
            params: &params,
            begins_early: false,
        };
        // SAFETY: the memory lives, and is as long as the sizes say.
        unsafe { emulator.launch(&launch, mode) }?;
        let out = out.values(DType::F32);
        let finite = out.iter().all(|x| x.is_finite());
        Ok(if finite { error(&out, &expected) } else { f64::INFINITY })
    };
    Mode::all_with_products().map(|mode| (mode, outcome(mode))).collect()
}

#[test]
fn unharmed_a_cluster_is_right_in_every_mode() {
    for (mode, outcome) in run("cluster_none", LAST_WAIT, LAST_WAIT) {
        let error = outcome.unwrap();
        assert!(error < TOLERANCE, "{mode:?}: {error:e}");
    }
}

#[test]
fn a_block_that_ends_before_the_other_s_last_arrival_is_reported() {
    let outcomes = run("cluster_end", LAST_WAIT, "");
    assert_reported(&outcomes, &["has ended", CLUSTER]);
    let once = LAST_WAIT.replace("steps + 2", "steps + 1");
    let outcomes = run("cluster_end_once", LAST_WAIT, &once);
    assert_reported(&outcomes, &["has ended", CLUSTER]);
}

/// It orders no arrivals.
#[test]
fn a_relaxed_barrier_of_the_cluster_after_the_last_arrivals_is_reported() {
    let barrier = "        ptx::cluster_arrive_relaxed();\n        ptx::cluster_wait();\n";
    let outcomes = run("cluster_relaxed", LAST_WAIT, barrier);
    assert_reported(&outcomes, &["has ended", CLUSTER]);
}

#[test]
fn another_block_s_barriers_before_the_cluster_has_met_are_reported() {
    let outcomes = run("cluster_begin", FIRST_BARRIER, "    __syncthreads();\n");
    let words = ["of block", "without a barrier of the cluster after its mbarrier.init"];
    assert_reported(&outcomes, &words);
}

#[test]
fn a_missing_fence_between_init_and_the_cluster_s_barrier_is_reported() {
    let init =
        "ptx::mbarrier_init(shared.empty[i], 2);  // a warp of each block reads what is loaded here
        }
        ptx::fence_mbarrier_init();
";
    let outcomes = run("cluster_fence", init, &init.replace("ptx::fence_mbarrier_init();", ""));
    assert_reported(&outcomes, &["without fence.mbarrier_init"]);
}

#[test]
fn a_block_that_the_cluster_does_not_have_is_reported() {
    let mask = "shared.full[stage], 3, 0";
    let outcomes = run("cluster_mask", mask, "shared.full[stage], 7, 0");
    assert_reported(&outcomes, &["multicast", "names block 2 of a cluster of 2"]);
    let outcomes = run("cluster_rank", "if (lane < 2)", "if (lane < 3)");
    assert_reported(&outcomes, &["names block 2 of a cluster of 2"]);
    // A launch without clusters.
    let outcomes = run_clusters("cluster_launch", mask, mask, 1);
    assert_reported(&outcomes, &["names block 1 of a cluster of 1"]);
    let outcomes = run_clusters("cluster_launch", mask, mask, 4);
    assert_reported(&outcomes, &["a grid of 2 blocks"]);
}

/// The other block may not have read what is written over in its memory.
#[test]
fn a_stage_given_back_by_one_block_alone_is_seen() {
    let count = "ptx::mbarrier_init(shared.empty[i], 2);";
    let outcomes = run("cluster_count", count, &count.replace('2', "1"));
    assert!(outcomes.iter().all(|(_, outcome)| outcome.is_err()), "{outcomes:?}");
    let give_back = "if (lane < 2) ptx::mbarrier_arrive_cluster(shared.empty[stage], lane);";
    let planted = "if (lane < 2) ptx::mbarrier_arrive(shared.empty[stage]);";
    assert_seen(&run("cluster_own", give_back, planted), |mode| {
        mode.timing == Timing::Early && mode.seed != 0
    });
}

#[test]
fn a_block_that_expects_the_bytes_of_its_own_half_alone_is_seen() {
    let bytes = "sizeof(shared.tiles[0])";
    assert_seen(&run("cluster_bytes", bytes, "sizeof(shared.tiles[0]) / 2"), |_| true);
}

#[test]
fn the_cluster_s_barrier_used_wrongly_is_reported() {
    let twice = FIRST_BARRIER.replace("wait", "arrive_relaxed");
    let outcomes = run("cluster_twice", FIRST_BARRIER, &twice);
    assert_reported(&outcomes, &["barrier.cluster.arrive twice"]);
    let (_, wait) = FIRST_BARRIER.split_once('\n').unwrap();
    let outcomes = run("cluster_wait", FIRST_BARRIER, wait);
    assert_reported(&outcomes, &["barrier.cluster.wait without barrier.cluster.arrive"]);
    // Between the two it orders nothing.
    let body = "    } else if (threadIdx.x >= kWarp) {\n        float sums[16] = {};\n";
    let early = format!("{body}        ptx::cluster_arrive_relaxed();\n");
    let outcomes = run("cluster_between", body, &early);
    assert_reported(&outcomes, &["between barrier.cluster.arrive and wait"]);
}
