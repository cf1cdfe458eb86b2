//! What this machine is, as far as it tells.

use std::fs;
use std::path::{Path, PathBuf};

/// The name of the CPU.
pub fn cpu() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name =
        info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, name)| name));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |name| name.trim().to_owned())
}

/// Instruction sets that matter here: those it has, and those it lacks.
pub fn features() -> (Vec<&'static str>, Vec<&'static str>) {
    macro_rules! all {
        ($is_detected:ident: $($name:tt),+) => { [$(($name, std::arch::$is_detected!($name))),+] };
    }
    #[cfg(target_arch = "x86_64")]
    let all = all!(is_x86_feature_detected: "avx2", "f16c", "avxvnni", "avx512f", "avx512bw", "avx512vnni");
    #[cfg(target_arch = "aarch64")]
    let all = all!(is_aarch64_feature_detected: "neon", "dotprod", "i8mm");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let all = [];
    let (has, lacks): (Vec<_>, Vec<_>) = all.into_iter().partition(|(_, has): &(&str, bool)| *has);
    let names = |list: Vec<(&'static str, bool)>| list.into_iter().map(|(name, _)| name).collect();
    (names(has), names(lacks))
}

/// Logical CPUs that the affinity mask of this process allows, as the system writes them: "0-3,8".
pub fn affinity() -> Option<String> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    Some(status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?.trim().to_owned())
}

/// CPUs' worth of time that the control group allows. None where it sets no limit.
pub fn cgroup_cpus() -> Option<f64> {
    let text = cgroup("cpu.max", "cpu/cpu.cfs_quota_us")?;
    let mut words = text.split_whitespace().map(str::parse::<f64>);
    let quota = words.next()?.ok().filter(|quota| *quota > 0.0)?;
    let period = match words.next() {
        Some(period) => period.ok()?,
        None => fs::read_to_string("/sys/fs/cgroup/cpu/cpu.cfs_period_us").ok()?.trim().parse().ok()?,
    };
    Some(quota / period)
}

/// Memory that a control group allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupMemory {
    /// Bytes in all.
    pub limit: u64,
    /// Bytes of them that nobody holds. Pages of files can be read again and are not counted as held.
    pub available: u64,
    /// Bytes that the group may swap out.
    swap: u64,
}

/// The control group of this process, or the one around it, that leaves least memory. None where none sets a limit.
/// `root` is where the system's files are: `/`.
pub fn cgroup_memory(root: &Path) -> Option<GroupMemory> {
    let read = |path: PathBuf| fs::read_to_string(path).ok();
    let mut all = Vec::new();
    for line in read(root.join("proc/self/cgroup"))?.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(own)) = (fields.next(), fields.next()) else { continue };
        let (mount, files) = match controllers {
            "" => ("sys/fs/cgroup", ["memory.max", "memory.swap.max", "memory.current", "file ", "shmem "]),
            list if list.split(',').any(|name| name == "memory") => (
                "sys/fs/cgroup/memory",
                [
                    "memory.limit_in_bytes",
                    "memory.memsw.limit_in_bytes",
                    "memory.usage_in_bytes",
                    "total_cache ",
                    "total_shmem ",
                ],
            ),
            _ => continue,
        };
        let [limit, swap, usage, cache, shared] = files;
        for group in Path::new(own.trim_start_matches('/')).ancestors() {
            let folder = root.join(mount).join(group);
            let number = |file: &str| read(folder.join(file))?.trim().parse::<u64>().ok();
            let stat = read(folder.join("memory.stat")).unwrap_or_default();
            let field = |name| stat.lines().find_map(|line| line.strip_prefix(name)?.parse().ok());
            // "max", or a number that no machine has, is no limit.
            let Some(limit) = number(limit).filter(|limit| *limit < 1 << 60) else { continue };
            let pages = field(cache).unwrap_or(0u64).saturating_sub(field(shared).unwrap_or(0));
            let held = number(usage).unwrap_or(0).saturating_sub(pages);
            // Version 1 limits the sum of memory and swap.
            let swap = number(swap).map_or(u64::MAX, |swap| {
                if controllers.is_empty() { swap } else { swap.saturating_sub(limit) }
            });
            all.push(GroupMemory { limit, available: limit.saturating_sub(held), swap });
        }
    }
    all.into_iter().min_by_key(|group| group.available.saturating_add(group.swap))
}

/// Bytes that this process can take, swap included, and what sets the limit. None where the system does not tell.
pub fn available() -> Option<(u64, &'static str)> {
    let (_, available, swap) = memory()?;
    let machine = (available.saturating_add(swap), "this machine has available");
    match cgroup_memory(Path::new("/")) {
        Some(group) => {
            let bytes = group.available.saturating_add(group.swap.min(swap));
            Some(machine.min((bytes, "the control group leaves")))
        }
        None => Some(machine),
    }
}

/// A setting of this process's control group, of version 2 or 1.
fn cgroup(two: &str, one: &str) -> Option<String> {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or("");
    let paths = [format!("{own}/{two}"), two.to_owned(), one.to_owned()];
    paths.iter().find_map(|path| fs::read_to_string(format!("/sys/fs/cgroup/{path}")).ok())
}

/// Bytes of memory in all, of memory that is available, and of free swap.
pub fn memory() -> Option<(u64, u64, u64)> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? << 10)
    };
    Some((field("MemTotal:")?, field("MemAvailable:")?, field("SwapFree:").unwrap_or(0)))
}

/// Bytes of memory that this process had at most, pages of files included.
pub fn resident_peak() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? << 10)
}

/// Whether the system gives huge pages: "always", "madvise" or "never".
pub fn huge_pages() -> Option<String> {
    let text = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").ok()?;
    Some(text.split_once('[')?.1.split_once(']')?.0.to_owned())
}

/// Threads that wanted to run in the last minute.
pub fn load() -> Option<f64> {
    fs::read_to_string("/proc/loadavg").ok()?.split(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A system's files: path and contents.
    fn group(files: &[(&str, &str)]) -> Option<GroupMemory> {
        let root = tempfile::tempdir().ok()?;
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent()?).ok()?;
            fs::write(path, text).ok()?;
        }
        cgroup_memory(root.path())
    }

    #[test]
    fn the_tightest_group_counts_and_pages_of_files_do_not() {
        const TWO: [(&str, &str); 7] = [
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("sys/fs/cgroup/a/b/memory.current", "900\n"),
            ("sys/fs/cgroup/a/memory.max", "1000\n"),
            ("sys/fs/cgroup/a/memory.swap.max", "50\n"),
            ("sys/fs/cgroup/a/memory.current", "900\n"),
            ("sys/fs/cgroup/a/memory.stat", "anon 200\nfile 650\nfile_mapped 3\nshmem 50\n"),
        ];
        assert_eq!(group(&TWO), Some(GroupMemory { limit: 1000, available: 700, swap: 50 }));
        assert_eq!(group(&TWO[..3]), None);
        assert_eq!(group(&[]), None);
        // Another group around the process that leaves less.
        let outer = [("sys/fs/cgroup/memory.max", "650"), ("sys/fs/cgroup/memory.swap.max", "0")];
        assert_eq!(group(&[&TWO[..], &outer].concat()).map(|group| group.limit), Some(650));
        const ONE: [(&str, &str); 5] = [
            ("proc/self/cgroup", "9:name=systemd:/x\n4:cpu,memory:/x\n0::/\n"),
            ("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "1000\n"),
            ("sys/fs/cgroup/memory/x/memory.usage_in_bytes", "600\n"),
            ("sys/fs/cgroup/memory/x/memory.stat", "cache 1\ntotal_cache 500\ntotal_shmem 100\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
        ];
        assert_eq!(group(&ONE), Some(GroupMemory { limit: 1000, available: 800, swap: u64::MAX }));
        // In a container the group is where the system's own files are.
        let own = ("sys/fs/cgroup/memory/memory.limit_in_bytes", "300");
        assert_eq!(group(&[ONE[0], own]).map(|group| (group.limit, group.available)), Some((300, 300)));
    }
}
