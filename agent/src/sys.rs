//! What the C library is asked that has no safe wrapper.

#![allow(unsafe_code, reason = "calls without arguments that could be wrong")]

/// Gives memory that was freed back to the kernel (malloc_trim(3)). A list of thousands of objects is
/// decoded page by page and leaves holes that the allocator would keep for the next one, which may
/// never come. Blocking: some milliseconds.
pub(crate) fn release_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes no pointer, and the allocator locks its arenas itself.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Has the allocator keep one heap for all threads and give large pieces back at once (mallopt(3)).
/// By default each thread has a heap with holes of its own, and the size from which pieces are mapped
/// singly grows with the first large list. Two threads that do little wait for one heap no more than for
/// the network. To be called before there are threads.
pub(crate) fn keep_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it only sets numbers of the allocator.
    unsafe {
        const LARGE: libc::c_int = 128 << 10;
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
        libc::mallopt(libc::M_TRIM_THRESHOLD, LARGE);
    }
}
