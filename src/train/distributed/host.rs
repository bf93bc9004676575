//! Shares of the processes of one host: a GPU and some of the cores for each.

use super::Communicator;
use crate::{Error, Result};
use candle_core::Device;

/// Opens a device by its name, as [`device`](crate::device()) does. `cuda` is the GPU whose number is that of this
/// process among those of its host.
///
/// [Example](crate::train::share)
///
/// # Errors
/// - `cuda`, with more processes on this host than GPUs that this process sees;
/// - those of [`device`](crate::device()).
pub fn device_of_rank(name: &str, communicator: &dyn Communicator) -> Result<Device> {
    let neighbours = communicator.on_this_host();
    if name != "cuda" || neighbours.len() == 1 {
        return crate::device(name);
    }
    crate::device(&format!("cuda:{}", gpu_of(&neighbours, communicator.rank(), crate::gpus()?)?))
}

/// Number of the GPU of `rank`, of `gpus`.
fn gpu_of(neighbours: &[usize], rank: usize, gpus: usize) -> Result<usize> {
    let processes = neighbours.len();
    let number = neighbours.iter().position(|neighbour| *neighbour == rank);
    number.filter(|_| processes <= gpus).ok_or_else(|| {
        let message = format!(
            "device cuda: {processes} processes on this host, and {gpus} GPUs that each sees: start one process a GPU; \
             where a scheduler shows each process a GPU of its own, name it cuda:0"
        );
        Error::config(message)
    })
}

/// Number of threads for this process, so that the processes of one host share its cores.
///
/// It is an equal share of every core that this process may run on, and of the control group's quota. Every rank must
/// ask.
///
/// [Example](crate::train::share)
///
/// # Errors
/// - the exchange failed.
pub fn threads_of_rank(communicator: &dyn Communicator) -> Result<usize> {
    let available = std::thread::available_parallelism().map_or(1, usize::from);
    let own = allowed_cores(available);
    let all = communicator.all_gather(bytemuck::cast_slice(&own))?;
    let neighbours: Vec<Vec<u32>> = communicator
        .on_this_host()
        .iter()
        .filter_map(|rank| all.get(*rank))
        .map(|bytes| bytes.as_chunks().0.iter().map(|core| u32::from_ne_bytes(*core)).collect())
        .collect();
    let share = share_of_cores(&own, &neighbours);
    // A quota, of a container as a rule, allows less than the affinity does.
    let quota = if available < own.len() { available / neighbours.len().max(1) } else { share };
    Ok(share.min(quota).max(1))
}

/// Cores of `own`, each divided by the number of neighbours that it is allowed to.
fn share_of_cores(own: &[u32], neighbours: &[Vec<u32>]) -> usize {
    let sharers = |core| neighbours.iter().filter(|cores| cores.contains(core)).count().max(1);
    let share: f64 = own.iter().map(|core| 1.0 / sharers(core) as f64).sum();
    // Three thirds may be less than one.
    (share + 1e-6) as usize
}

/// Cores on which this process may run.
fn allowed_cores(available: usize) -> Vec<u32> {
    #[cfg(target_os = "linux")]
    if let Ok(set) = rustix::thread::sched_getaffinity(None) {
        let cores = (0..rustix::thread::CpuSet::MAX_CPU).filter(|core| set.is_set(*core));
        return cores.map(|core| core as u32).collect();
    }
    (0..available as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_takes_the_gpu_of_its_local_rank() -> Result<()> {
        let neighbours = [4, 6, 9];
        for (number, rank) in neighbours.into_iter().enumerate() {
            assert_eq!(gpu_of(&neighbours, rank, 8)?, number);
        }
        Ok(())
    }

    #[test]
    fn more_processes_than_gpus_are_refused() {
        let message = gpu_of(&[0, 1, 2], 0, 2).unwrap_err().to_string();
        assert!(message.contains("3 processes on this host, and 2 GPUs"), "{message}");
        assert!(message.contains("cuda:0"), "{message}");
    }

    #[test]
    fn cores_are_shared_by_those_that_may_run_on_them() {
        let free: Vec<u32> = (0..8).collect();
        assert_eq!(share_of_cores(&free, &vec![free.clone(); 3]), 2);
        assert_eq!(share_of_cores(&free, std::slice::from_ref(&free)), 8);
        // mpirun and Slurm bind processes: each has its cores already.
        let bound = [vec![0, 1, 2, 3], vec![4, 5, 6, 7]];
        assert_eq!(share_of_cores(&bound[1], &bound), 4);
        let thirds = vec![vec![0, 1, 2]; 3];
        assert_eq!(share_of_cores(&thirds[0], &thirds), 1);
    }
}
