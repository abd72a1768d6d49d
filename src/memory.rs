//! What can be held in memory, asked before it is allocated: an allocation that fails ends the process.

use std::sync::OnceLock;

/// Up to here nothing is asked: it would cost a small problem more than its arithmetic.
const SMALL: f64 = (64 << 20) as f64;

/// Whether a tensor of these sizes can be indexed: in bytes of f32, with room for padding. A size of 0 counts as 1, so
/// that the product of some of the sizes is safe as well.
pub(crate) fn is_addressable(sizes: &[usize]) -> bool {
    let product = sizes.iter().try_fold(1, |product: usize, &size| product.checked_mul(size.max(1)));
    product.is_some_and(|elements| elements <= isize::MAX as usize >> 4)
}

/// Whether so many bytes can be had. In f64, in which no estimate overflows.
pub(crate) fn is_available(bytes: f64) -> bool {
    // A kernel that overcommits grants anything, and ends the process when the memory is used.
    let within = installed().is_none_or(|installed| bytes <= installed);
    bytes <= SMALL
        || (within && bytes < isize::MAX as f64 && Vec::<u8>::new().try_reserve_exact(bytes as usize).is_ok())
}

/// Memory and swap of the machine in bytes, where there is a way to know.
fn installed() -> Option<f64> {
    static INSTALLED: OnceLock<Option<f64>> = OnceLock::new();
    *INSTALLED.get_or_init(|| sum_of_totals(&std::fs::read_to_string("/proc/meminfo").ok()?))
}

fn sum_of_totals(meminfo: &str) -> Option<f64> {
    let total = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok()
    };
    Some(1024. * (total("MemTotal:")? + total("SwapTotal:").unwrap_or(0.)))
}

/// Gives back the memory of a part of a file that is mapped. If it is read again, it is read from the file again.
///
/// # Safety
/// The bytes must be of a file that is mapped for reading alone: memory of another kind would lose what it holds.
pub(crate) unsafe fn release_mapped(bytes: &[u8]) {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: a question without consequences.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.max(1) as usize;
        let skipped = bytes.as_ptr().align_offset(page);
        if let Some(whole) = bytes.len().checked_sub(skipped).map(|len| len / page * page) {
            // SAFETY: whole pages within the bytes; what they hold is in the file, as the caller says. A call that fails
            // changes nothing.
            unsafe { libc::madvise(bytes[skipped..].as_ptr() as *mut _, whole, libc::MADV_DONTNEED) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = bytes;
}

/// Bytes as a person reads them.
pub(crate) fn shown(bytes: f64) -> String {
    format!("{:.1} GiB", bytes / (1u64 << 30) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_that_overflow_are_not_addressable() {
        assert!(is_addressable(&[]) && is_addressable(&[1 << 30, 1 << 20]));
        assert!(is_addressable(&[0, usize::MAX >> 5]));
        for sizes in [&[usize::MAX][..], &[1 << 59], &[1 << 32, 1 << 32], &[1 << 40, 1 << 40, 0]] {
            assert!(!is_addressable(sizes), "{sizes:?}");
        }
    }

    #[test]
    fn what_no_machine_has_is_not_available() {
        assert!(is_available(0.) && is_available(SMALL) && is_available(2. * SMALL));
        for bytes in [2f64.powi(48), 2f64.powi(63), 2f64.powi(200), f64::INFINITY, f64::NAN] {
            assert!(!is_available(bytes), "{bytes}");
        }
    }

    #[test]
    fn the_kernel_counts_in_units_of_1024_bytes() {
        let text = "MemTotal:       24594432 kB\nMemFree: 1 kB\nSwapTotal:  1024 kB\n";
        assert_eq!(sum_of_totals(text), Some(1024. * 24_595_456.));
        assert_eq!(sum_of_totals("MemTotal: 1 kB\n"), Some(1024.));
        assert_eq!(sum_of_totals("MemTotal: many\n"), None);
    }
}
