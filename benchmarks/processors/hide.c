/* A processor with fewer instruction sets than this one, for the programs that it is preloaded into.
 *
 *   gcc -O1 -shared -fPIC -o hide.so hide.c -ldl
 *   HIDE=vnni LD_PRELOAD=./hide.so COMMAND     AVX-512 without VNNI, or AVX2 without AVX-VNNI
 *   HIDE=avx512 LD_PRELOAD=./hide.so COMMAND   AVX2, and no VNNI
 *
 * Libraries choose their kernels by what CPUID says. Linux lets a thread make CPUID raise SIGSEGV (arch_prctl(2),
 * ARCH_SET_CPUID; Intel's "CPUID faulting", flag cpuid_fault in /proc/cpuinfo); the handler here runs the instruction,
 * clears bits of leaf 7 (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, CPUID), and goes on
 * behind it. Threads and forks inherit the setting, what they execute loads this library again. Faulthandlers of a
 * program are called for every other fault. A program that must crash by SIGSEGV may do so otherwise. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#ifndef ARCH_SET_CPUID
#define ARCH_SET_CPUID 0x1012
#endif

static int active, hide_avx512;
static struct sigaction theirs;
static int (*set_action)(int, const struct sigaction *, struct sigaction *);

static void clear_bits(unsigned leaf, unsigned sub, unsigned *a, unsigned *b, unsigned *c, unsigned *d) {
  if (leaf != 7) return;
  if (sub == 0) {
    *c &= ~(1u << 11);                              /* AVX512_VNNI */
    *d &= ~(1u << 22 | 1u << 24 | 1u << 25);        /* AMX */
    if (hide_avx512) {
      *b &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31);
      *c &= ~(1u << 1 | 1u << 6 | 1u << 12 | 1u << 14);
      *d &= ~(1u << 2 | 1u << 3 | 1u << 8 | 1u << 23);
    }
  }
  if (sub == 1) {
    *a &= ~(1u << 4 | 1u << 21);                    /* AVX_VNNI, AMX_FP16 */
    *d &= ~(1u << 4 | 1u << 5 | 1u << 10);          /* AVX_VNNI_INT8, AVX_NE_CONVERT, AVX_VNNI_INT16 */
    if (hide_avx512) *a &= ~(1u << 5);              /* AVX512_BF16 */
  }
}

static void handle(int number, siginfo_t *info, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const unsigned char *at = (const unsigned char *)registers[REG_RIP];
  if (info->si_code == SI_KERNEL && at[0] == 0x0f && at[1] == 0xa2) {
    unsigned a = registers[REG_RAX], c = registers[REG_RCX], leaf = a, sub = c, b, d;
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
    clear_bits(leaf, sub, &a, &b, &c, &d);
    registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
    registers[REG_RIP] += 2;
    return;
  }
  if (theirs.sa_flags & SA_SIGINFO && theirs.sa_sigaction) {
    theirs.sa_sigaction(number, info, context);
  } else if (theirs.sa_handler != SIG_DFL && theirs.sa_handler != SIG_IGN) {
    theirs.sa_handler(number);
  } else {
    struct sigaction plain;
    memset(&plain, 0, sizeof plain);
    plain.sa_handler = SIG_DFL;
    set_action(number, &plain, 0);
  }
}

int sigaction(int number, const struct sigaction *action, struct sigaction *before) {
  if (!set_action) set_action = dlsym(RTLD_NEXT, "sigaction");
  if (number != SIGSEGV || !active) return set_action(number, action, before);
  if (before) *before = theirs;
  if (action) theirs = *action;
  return 0;
}

__attribute__((constructor)) static void start(void) {
  const char *hidden = getenv("HIDE");
  if (!hidden) return;
  if (!set_action) set_action = dlsym(RTLD_NEXT, "sigaction");
  struct sigaction own;
  memset(&own, 0, sizeof own);
  own.sa_sigaction = handle;
  own.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  set_action(SIGSEGV, &own, 0);
  hide_avx512 = !strcmp(hidden, "avx512");
  if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0)) {
    static const char said[] = "hide.so: this machine cannot trap CPUID\n";
    (void)!write(2, said, sizeof said - 1);
    _exit(3);
  }
  active = 1;
}
