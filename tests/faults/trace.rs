//! Runs a process under ptrace, counts the points where it writes, and lets one of them go wrong.

use libc::{c_int, c_void, pid_t, user_regs_struct};
use std::collections::HashMap;
use std::io::{Error, Result};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr::null_mut;

/// A fault put into a process.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// The process is killed before the call.
    Kill,
    /// The call is not made, and fails with this error number.
    Refuse(i32),
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum End {
    /// With this exit code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

/// Runs `command` with `fault` at the given point, counted from 1; the number of points met, and the end.
pub fn run(command: &mut Command, fault: Option<(usize, Fault)>) -> Result<(usize, End)> {
    // SAFETY: between fork and exec only a system call is made.
    unsafe { command.pre_exec(|| ptrace(libc::PTRACE_TRACEME, 0, 0).map(drop)) };
    let main = command.spawn()?.id() as pid_t;
    wait(main)?;
    let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_EXITKILL;
    ptrace(libc::PTRACE_SETOPTIONS, main, options as usize)?;
    go_on(main, 0)?;
    let mut points = 0;
    // The threads inside a call, with the error that it is to fail with.
    let mut inside: HashMap<pid_t, Option<i32>> = HashMap::new();
    loop {
        let (pid, status) = wait(-1)?;
        if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
            match pid == main {
                true if libc::WIFEXITED(status) => {
                    return Ok((points, End::Code(libc::WEXITSTATUS(status))))
                }
                true => return Ok((points, End::Signal(libc::WTERMSIG(status)))),
                false => continue,
            }
        }
        let signal = match libc::WSTOPSIG(status) {
            // A call, as PTRACE_O_TRACESYSGOOD marks it: once before and once after.
            signal if signal == libc::SIGTRAP | 0x80 => {
                match inside.remove(&pid) {
                    None => {
                        let registers = registers(pid)?;
                        points += usize::from(writes(&registers));
                        let here = fault.filter(|(at, _)| writes(&registers) && *at == points);
                        let refused = match here {
                            Some((_, Fault::Kill)) => {
                                // SAFETY: a signal to a child that has not been waited for.
                                unsafe { libc::kill(main, libc::SIGKILL) };
                                continue;
                            }
                            Some((_, Fault::Refuse(error))) => {
                                // No call has this number.
                                set_registers(
                                    pid,
                                    user_regs_struct { orig_rax: u64::MAX, ..registers },
                                )?;
                                Some(error)
                            }
                            None => None,
                        };
                        inside.insert(pid, refused);
                    }
                    Some(Some(error)) => {
                        let rax = -i64::from(error) as u64;
                        set_registers(pid, user_regs_struct { rax, ..registers(pid)? })?;
                    }
                    Some(None) => {}
                }
                0
            }
            // A thread begins, or began another.
            libc::SIGSTOP | libc::SIGTRAP => 0,
            signal => signal,
        };
        go_on(pid, signal)?;
    }
}

/// Lets a thread run to its next stop; one that was killed meanwhile has none.
fn go_on(pid: pid_t, signal: i32) -> Result<()> {
    match ptrace(libc::PTRACE_SYSCALL, pid, signal as usize) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        result => result,
    }
}

fn ptrace(request: libc::c_uint, pid: pid_t, data: usize) -> Result<()> {
    // SAFETY: the data of these requests is a number, or the address of registers that outlive the call.
    match unsafe { libc::ptrace(request, pid, null_mut::<c_void>(), data as *mut c_void) } {
        -1 => Err(Error::last_os_error()),
        _ => Ok(()),
    }
}

fn registers(pid: pid_t) -> Result<user_regs_struct> {
    // SAFETY: registers are numbers, for which zero is a value.
    let mut registers: user_regs_struct = unsafe { std::mem::zeroed() };
    ptrace(libc::PTRACE_GETREGS, pid, &raw mut registers as usize)?;
    Ok(registers)
}

fn set_registers(pid: pid_t, registers: user_regs_struct) -> Result<()> {
    ptrace(libc::PTRACE_SETREGS, pid, &raw const registers as usize)
}

/// The next change in a process, or in any for -1: whose, and which.
fn wait(pid: pid_t) -> Result<(pid_t, c_int)> {
    let mut status = 0;
    // SAFETY: the status outlives the call.
    match unsafe { libc::waitpid(pid, &mut status, libc::__WALL) } {
        -1 => Err(Error::last_os_error()),
        pid => Ok((pid, status)),
    }
}

/// Whether a call changes a file or a folder.
fn writes(registers: &user_regs_struct) -> bool {
    let for_writing =
        |flags: u64| flags as i32 & (libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT) != 0;
    match registers.orig_rax as i64 {
        libc::SYS_open => for_writing(registers.rsi),
        libc::SYS_openat => for_writing(registers.rdx),
        // Not to the terminal.
        libc::SYS_write | libc::SYS_writev | libc::SYS_pwrite64 => registers.rdi > 2,
        libc::SYS_fsync
        | libc::SYS_fdatasync
        | libc::SYS_ftruncate
        | libc::SYS_fchmod
        | libc::SYS_chmod => true,
        libc::SYS_rename
        | libc::SYS_renameat
        | libc::SYS_renameat2
        | libc::SYS_link
        | libc::SYS_linkat => true,
        libc::SYS_unlink | libc::SYS_unlinkat | libc::SYS_mkdir | libc::SYS_mkdirat => true,
        _ => false,
    }
}
