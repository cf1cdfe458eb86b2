//! What this machine is, as far as it tells.

#[cfg(target_arch = "x86_64")]
use bitnet::kernels::supported;
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
    let all = [
        &all!(is_x86_feature_detected: "avx2", "f16c", "avxvnni", "avx512f", "avx512bw", "avx512vnni", "avx512vbmi", "gfni")[..],
        &[("amx-int8", supported().iter().any(|kernels| kernels.name() == "amx"))],
    ]
    .concat();
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
    said("/proc/self/status", "Cpus_allowed_list:")
}

/// What a file of the system has behind `name`.
fn said(file: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    Some(text.lines().find_map(|line| line.strip_prefix(name))?.trim().to_owned())
}

/// The bytes that are said in kB.
fn said_bytes(file: &str, name: &str) -> Option<u64> {
    Some(said(file, name)?.strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

/// The folders of the control group of this process that has `controller`, and of those around it; and whether it is one of
/// version 2. `root` is where the system's files are: `/`.
fn groups(root: &Path, controller: &str) -> Vec<(PathBuf, bool)> {
    let text = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mut folders = Vec::new();
    for line in text.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(own)) = (fields.next(), fields.next()) else { continue };
        let mount = match controllers {
            "" => root.join("sys/fs/cgroup"),
            list if list.split(',').any(|name| name == controller) => {
                root.join("sys/fs/cgroup").join(controller)
            }
            _ => continue,
        };
        let own = Path::new(own.trim_start_matches('/'));
        folders.extend(own.ancestors().map(|group| (mount.join(group), controllers.is_empty())));
    }
    folders
}

/// CPUs' worth of time that the control groups of this process allow. None where they set no limit. `root` as in
/// [`cgroup_memory`].
pub fn cgroup_cpus(root: &Path) -> Option<f64> {
    let limit = |(folder, two): &(PathBuf, bool)| {
        let files = if *two { &["cpu.max"][..] } else { &["cpu.cfs_quota_us", "cpu.cfs_period_us"] };
        let text: Vec<String> =
            files.iter().map(|file| fs::read_to_string(folder.join(file)).ok()).collect::<Option<_>>()?;
        let words: Vec<f64> =
            text.join(" ").split_whitespace().map(|word| word.parse().ok()).collect::<Option<_>>()?;
        (words.len() == 2 && words[0] > 0.0).then(|| words[0] / words[1])
    };
    groups(root, "cpu").iter().filter_map(limit).min_by(f64::total_cmp)
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
    let mut all = Vec::new();
    for (folder, two) in groups(root, "memory") {
        let files = match two {
            true => ["memory.max", "memory.swap.max", "memory.current", "file ", "shmem "],
            false => [
                "memory.limit_in_bytes",
                "memory.memsw.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_cache ",
                "total_shmem ",
            ],
        };
        let [limit, swap, usage, cache, shared] = files;
        let read = |file: &str| fs::read_to_string(folder.join(file)).ok();
        let number = |file: &str| read(file)?.trim().parse::<u64>().ok();
        let stat = read("memory.stat").unwrap_or_default();
        let field = |name| stat.lines().find_map(|line| line.strip_prefix(name)?.parse().ok());
        // "max", or a number that no machine has, is no limit.
        let Some(limit) = number(limit).filter(|limit| *limit < 1 << 60) else { continue };
        let pages = field(cache).unwrap_or(0u64).saturating_sub(field(shared).unwrap_or(0));
        let held = number(usage).unwrap_or(0).saturating_sub(pages);
        // Version 1 limits the sum of memory and swap.
        let swap = number(swap).map_or(u64::MAX, |swap| if two { swap } else { swap.saturating_sub(limit) });
        all.push(GroupMemory { limit, available: limit.saturating_sub(held), swap });
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

/// Bytes of memory in all, of memory that is available, and of free swap.
#[cfg(target_os = "linux")]
pub fn memory() -> Option<(u64, u64, u64)> {
    let field = |name| said_bytes("/proc/meminfo", name);
    Some((field("MemTotal:")?, field("MemAvailable:")?, field("SwapFree:").unwrap_or(0)))
}

/// Bytes of memory in all, of memory that is available, and of free swap.
#[cfg(not(target_os = "linux"))]
pub fn memory() -> Option<(u64, u64, u64)> {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    let available = system.available_memory();
    (available > 0).then(|| (system.total_memory(), available, system.free_swap()))
}

/// Bytes of memory that this process has, and had at most, pages of files included.
pub fn resident() -> Option<(u64, u64)> {
    let field = |name| said_bytes("/proc/self/status", name);
    Some((field("VmRSS:")?, field("VmHWM:")?))
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

    /// What `ask` finds among a system's files: path and contents.
    fn of<R>(files: &[(&str, &str)], ask: fn(&Path) -> Option<R>) -> Option<R> {
        let root = tempfile::tempdir().ok()?;
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent()?).ok()?;
            fs::write(path, text).ok()?;
        }
        ask(root.path())
    }
    fn group(files: &[(&str, &str)]) -> Option<GroupMemory> {
        of(files, cgroup_memory)
    }

    #[test]
    fn the_least_quota_of_cpu_time_counts() {
        let two = [
            ("proc/self/cgroup", "0::/a/b\n"),
            ("sys/fs/cgroup/a/b/cpu.max", "max 100000\n"),
            ("sys/fs/cgroup/a/cpu.max", "150000 100000\n"),
        ];
        assert_eq!(of(&two, cgroup_cpus), Some(1.5));
        assert_eq!(of(&two[..2], cgroup_cpus), None);
        let one = [
            ("proc/self/cgroup", "2:memory:/\n1:cpu,cpuacct:/x\n"),
            ("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n"),
            ("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"),
            ("sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "50000\n"),
            ("sys/fs/cgroup/cpu/x/cpu.cfs_period_us", "100000\n"),
        ];
        assert_eq!(of(&one, cgroup_cpus), Some(0.5));
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
